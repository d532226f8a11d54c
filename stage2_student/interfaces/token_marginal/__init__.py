"""The token-marginal interface: the student's own token probabilities, summed to bytes by the canonical covering.

May import what `stage2_student.interfaces` may.
"""
