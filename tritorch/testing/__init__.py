"""Tools to test kernels: the corrected interpreter, the dry driver, the tolerance rule, generated
cases.
"""
