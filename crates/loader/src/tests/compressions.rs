//! Each compression, as the kernel build's own tools make it (vectors/generate.sh).

use std::error::Error;

use crate::LoadError;
use crate::decompress::decompress;

const VECTORS: [(&str, &[u8]); 7] = [
    ("gzip", include_bytes!("../../vectors/payload.gzip")),
    ("bzip2", include_bytes!("../../vectors/payload.bzip2")),
    ("lzma", include_bytes!("../../vectors/payload.lzma")),
    ("xz", include_bytes!("../../vectors/payload.xz")),
    ("lzo", include_bytes!("../../vectors/payload.lzo")),
    ("lz4", include_bytes!("../../vectors/payload.lz4")),
    ("zstd", include_bytes!("../../vectors/payload.zstd")),
];

/// The formula of vectors/generate.sh.
fn plain() -> Vec<u8> {
    let byte = |i: u64| {
        if i % 4096 < 512 {
            (((i * i) >> 9) ^ (i >> 3)) as u8
        } else {
            (i >> 12) as u8
        }
    };
    let mut data: Vec<u8> = (0..300_000).map(byte).collect();
    for i in (0..290_000_u32).step_by(1000) {
        let at = i as usize;
        data[at] = 0xe8;
        data[at + 1..at + 5].copy_from_slice(&7777_u32.wrapping_sub(i).to_le_bytes());
    }
    data
}

#[test]
fn every_format_gives_the_original() {
    for (name, payload) in VECTORS {
        let out = decompress(payload, 1 << 20).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(out == plain(), "{name} differs");
    }
}

#[test]
fn a_declared_size_past_the_limit_is_refused_before_decompression() {
    for (name, payload) in VECTORS {
        let refused = decompress(payload, 299_999);
        assert!(
            matches!(
                refused,
                Err(LoadError::TooLarge {
                    size_bytes: 300_000,
                    ..
                })
            ),
            "{name}: {refused:?}"
        );
    }
}

#[test]
fn a_stream_that_yields_more_or_less_than_declared_is_refused() {
    for (name, payload) in VECTORS {
        for declared in [299_000_u32, 300_001] {
            let mut payload = payload.to_vec();
            let size = payload.len() - 4;
            payload[size..].copy_from_slice(&declared.to_le_bytes());
            let refused = decompress(&payload, 1 << 20);
            assert!(
                matches!(
                    refused,
                    Err(LoadError::Damaged(_) | LoadError::Decompress { .. })
                ),
                "{name} declared {declared}: {refused:?}"
            );
        }
    }
}

#[test]
fn a_stream_that_ends_early_is_refused() {
    for (name, payload) in VECTORS {
        let mut cut = payload[..payload.len() / 2].to_vec();
        cut.extend_from_slice(&300_000_u32.to_le_bytes());
        let refused = decompress(&cut, 1 << 20).expect_err(name);
        assert!(
            matches!(refused, LoadError::Damaged(_)) || refused.source().is_some(),
            "{name}: {refused:?}"
        );
    }
}

#[test]
fn an_unknown_compression_is_named_as_such() {
    let refused = decompress(b"not a payload", 1 << 20);
    assert!(matches!(refused, Err(LoadError::Unsupported(_))));
}
