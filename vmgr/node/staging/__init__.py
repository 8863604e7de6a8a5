"""The guests' disks on a node: overlays on the pool's image, on a copy in a shared file system, or on one in memory."""
