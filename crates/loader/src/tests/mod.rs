//! Kernels built by hand, and what the loader makes of them.

mod build;
mod compressions;
mod hostile;
mod open;
mod place;
