"""Where faces come from, and their pixels: folders, zip and tar archives, lists; decoding and resizing."""
