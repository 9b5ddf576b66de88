"""What tests of kernels need and users do not: Triton's interpreter repaired, and machine code for sm_90."""
