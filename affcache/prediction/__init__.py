"""Trained heads on new faces: a run as something that takes images, and as a folder to share."""
