"""Guest images: the pool that holds them and the builder that makes them from recipes."""
