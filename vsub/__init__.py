"""vTorque submission front end."""
