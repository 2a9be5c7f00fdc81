//! Whatever bytes a guest calls code, the translator has a translation.

#[cfg(test)]
mod tests {
    use ringfence_engine_bt::Listing;
    use ringfence_engine_bt::list_translation;

    /// Encodings of instructions: every opcode of every map, with prefixes and operands of each
    /// kind. Bytes that are none are among them.
    fn encodings() -> impl Iterator<Item = Vec<u8>> {
        const PREFIXES: [&[u8]; 8] = [
            &[],
            &[0x66],
            &[0x67],
            &[0xf2],
            &[0xf3],
            &[0x64],
            &[0xf0],
            &[0x66, 0xf3],
        ];
        // Legacy maps, and VEX with and without W and L.
        const MAPS: [&[u8]; 10] = [
            &[],
            &[0x0f],
            &[0x0f, 0x38],
            &[0x0f, 0x3a],
            &[0xc5, 0xf9],
            &[0xc4, 0xe1, 0x7c],
            &[0xc4, 0xe2, 0x79],
            &[0xc4, 0xe2, 0xfd],
            &[0xc4, 0xe3, 0x79],
            &[0xc4, 0xe3, 0xfd],
        ];
        let operands = (0..8).flat_map(|extension| {
            // A register; memory by EBX, by a base with index and displacement, by one alone.
            [0xc1, 0x03, 0x84, 0x05].map(|form| form | extension << 3)
        });
        PREFIXES.iter().flat_map(move |prefix| {
            let operands = operands.clone();
            MAPS.iter().flat_map(move |map| {
                let operands = operands.clone();
                (0..=255).flat_map(move |opcode| {
                    operands.clone().map(move |operand| {
                        let tail = [opcode, operand, 0x9d, 0x10, 0x20, 0x30, 0x40, 0x50];
                        [*prefix, *map, &tail].concat()
                    })
                })
            })
        })
    }

    #[test]
    fn every_instruction_of_every_mode_has_a_translation() {
        for bits in [32, 64] {
            for user in [true, false] {
                let listing = Listing {
                    bits,
                    user,
                    ..Listing::default()
                };
                for code in encodings() {
                    assert!(!list_translation(&code, listing).is_empty());
                }
            }
        }
    }

    /// Three groups hold their pointers in all the registers that need no REX prefix and that the code
    /// doesn't name, and BH excludes the others.
    #[test]
    fn a_high_byte_beside_three_pointers_has_a_translation() {
        let code = [
            0xdc, 0x2d, 0x89, 0xb7, 0xce, 0x48, 0x96, 0x50, 0x87, 0xc8, 0x18, 0x7c, 0x2e, 0x5b,
            0xbb, 0x9a, 0xd6, 0x38, 0x6e, 0x4e, 0x00, 0x56, 0x35, 0xa3, 0x27, 0x11, 0x28, 0x30,
            0xbe, 0x91, 0x02, 0x63, 0xc5, 0xe8, 0xe2, 0x95, 0xc5, 0xb5, 0x7f, 0x4b,
        ];
        let listing = Listing {
            offset: 1247,
            bits: 32,
            fast_pext: false,
            ..Listing::default()
        };
        assert!(list_translation(&code, listing).contains("sbb"));
    }

    #[test]
    fn random_code_has_a_translation() {
        const SEQUENCES: usize = 100_000;
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for _ in 0..SEQUENCES {
            let words: [u64; 6] = std::array::from_fn(|_| random());
            let code = words.map(u64::to_le_bytes).concat();
            let choice = random();
            let listing = Listing {
                bits: if choice & 1 == 0 { 32 } else { 64 },
                user: choice & 2 == 0,
                plain: choice & 12 == 0,
                fast_pext: choice & 16 == 0,
                offset: if choice & 96 == 0 { 4060 } else { 0 } + (choice >> 32 & 31) as u16,
            };
            assert!(!list_translation(&code, listing).is_empty());
        }
    }
}
