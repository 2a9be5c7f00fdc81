//! The device as a guest's FUSE client sees it, on real host directories.

mod basic;
mod client;
mod composed;
mod hostile;
mod state;
