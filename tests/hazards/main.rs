//! What kernels do wrong, shown by raw system calls: one test for each hazard.
