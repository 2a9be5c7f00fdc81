//! See the harness's body of this name.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ringfence_fuzz_harness::loader::kernel(data));
