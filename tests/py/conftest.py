"""What all tests share."""
import signal

# A shell starts background jobs with SIGINT ignored, and their children inherit that; the tests of
# Ctrl-C need it as a terminal gives it, here and in what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
