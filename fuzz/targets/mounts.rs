//! Fuzzes `properties::mounts`.

#![no_main]

#[allow(dead_code)] // each target is one of them
#[path = "../../tests/fuzzed/properties.rs"]
mod properties;

libfuzzer_sys::fuzz_target!(|data: &[u8]| properties::mounts(data));
