"""One function a verb: parsed arguments and a progress callback in, an `Outcome` out.

The modules import what does the work inside the functions, so that each verb loads only what it needs.
"""
