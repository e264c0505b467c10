"""Other people's transcoders: what has been published about them."""
