"""Photos and videos to faces: decoded, detected, tracked, aligned."""
