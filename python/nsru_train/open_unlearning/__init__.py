"""Inside a checkout of OpenUnlearning: its programs with our methods and adapters."""
