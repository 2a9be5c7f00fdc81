//! x86-64 formats that more than one crate reads or writes: registers, CPUID, MSR numbers,
//! descriptors and page-table entries. Data and pure functions only.
//!
//! Sources: Intel SDM (2024), AMD APM volumes 2 and 3.

#![forbid(unsafe_code)]

pub mod cpuid;
pub mod msr;
pub mod paging;
pub mod state;
