"""Colors, panels, the demo and the page."""
