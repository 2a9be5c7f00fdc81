//! Code that once ran differently, each by what it is about.

#[cfg(test)]
mod tests {
    use ringfence_engine_bt::Direct;
    use ringfence_fuzz_differential::case::Case;
    use ringfence_fuzz_differential::case::Piece;
    use ringfence_fuzz_differential::guest::MANNERS;
    use ringfence_fuzz_differential::layout::CODE;
    use ringfence_fuzz_differential::layout::DATA;
    use ringfence_fuzz_differential::layout::PAGE;
    use ringfence_fuzz_differential::layout::STACK;
    use ringfence_fuzz_differential::session::Batch;
    use ringfence_fuzz_differential::session::Session;
    use ringfence_fuzz_differential::state::State;
    use ringfence_fuzz_differential::state::UPPER;

    const RAX: usize = 0;
    const RBX: usize = 3;
    const RSP: usize = 4;
    const RSI: usize = 6;
    const RDI: usize = 7;
    const R11: usize = 11;
    const R13: usize = 13;
    const R14: usize = 14;
    const R15: usize = 15;
    /// The end of the data's first page, whose next page is there.
    const PAGE_END: u64 = DATA + PAGE;
    /// The end of the data's fourth page, whose next page isn't.
    const LAST_BYTE: u64 = DATA + 4 * PAGE - 1;

    /// Registers as no code leaves them by chance.
    fn state() -> State {
        let mut state = State {
            rip: CODE + 0x100,
            rflags: 0x202,
            ..State::default()
        };
        for (number, value) in (0_u64..).zip(&mut state.gpr) {
            *value = 0x1111_1111_1111_1111 * number;
        }
        state.gpr[RSP] = STACK + 0x1800;
        for (number, at) in (160..416).chain(UPPER..UPPER + 256).enumerate() {
            state.xsave[at] = number.to_le_bytes()[0].wrapping_mul(37);
        }
        state
    }

    /// Runs code from a state on both sides, in every manner.
    fn check(code: &[u8], change: impl FnOnce(&mut State)) {
        if let Some(reason) = Session::obstacle() {
            eprintln!("skipped: {reason}");
            return;
        }
        let mut state = state();
        change(&mut state);
        let pieces = vec![Piece::plain(code)];
        let batch = Batch {
            cases: vec![Case { pieces, state }],
            memory: 7,
        };
        for direct in [Direct::Never, Direct::Always] {
            let mut session = Session::with(direct).expect("both sides");
            for manner in MANNERS {
                if let Err(trouble) = session.run(&batch, &[manner]) {
                    panic!("{direct:?}: {trouble:?}\n{}", batch.cases[0].listing());
                }
            }
        }
    }

    #[test]
    fn code_may_write_over_its_own_page() {
        // mov byte [rip + 1], 6; mov al, 5
        check(&[0xc6, 0x05, 1, 0, 0, 0, 6, 0xb0, 5], |_| {});
    }

    #[test]
    fn a_crossing_access_leaves_borrowed_registers_alone() {
        // Two groups, [rsi] and [rdi], are open while [rax] crosses a page.
        let code = [
            &[0x48, 0x8b, 0x0e][..],
            &[0x48, 0x8b, 0x17],
            &[0x48, 0x03, 0x4e, 0x08],
            &[0x48, 0x03, 0x57, 0x08],
            &[0x48, 0x03, 0x08],
            &[0x48, 0x89, 0x4e, 0x10],
            &[0x48, 0x89, 0x57, 0x10],
            &[0x48, 0x89, 0x4e, 0x18],
            &[0x48, 0x89, 0x57, 0x18],
        ]
        .concat();
        check(&code, |state| {
            state.gpr[RSI] = DATA + 0x100;
            state.gpr[RDI] = DATA + 0x200;
            state.gpr[RAX] = PAGE_END - 3;
        });
    }

    #[test]
    fn a_stand_in_for_r11_is_not_taken_for_the_register_itself() {
        // mov [rsi], r11; mov [rdi], rbx; mov rbx, [rsi]; mov r11, [rdi], all across a page's end.
        let code = [
            &[0x4c, 0x89, 0x1e][..],
            &[0x48, 0x89, 0x1f],
            &[0x48, 0x8b, 0x1e],
            &[0x4c, 0x8b, 0x1f],
        ]
        .concat();
        check(&code, |state| {
            state.gpr[RSI] = PAGE_END - 3;
            state.gpr[RDI] = PAGE_END + PAGE - 5;
        });
    }

    #[test]
    fn byte_registers_up_to_r15b_go_to_memory() {
        // mov [rsi], r15b; mov [rdi], sil; xchg [rsi], r12b.
        let code = [
            &[0x44, 0x88, 0x3e][..],
            &[0x40, 0x88, 0x37],
            &[0x44, 0x86, 0x26],
        ]
        .concat();
        check(&code, |state| {
            state.gpr[RSI] = DATA + 8;
            state.gpr[RDI] = DATA + 16;
        });
    }

    #[test]
    fn masked_stores_write_only_what_is_chosen() {
        // vpmaskmovd [rsi], ymm0, ymm1, across a page's end; vmaskmovps [rsi], ymm1, ymm0.
        let code = [
            &[0xc4, 0xe2, 0x7d, 0x8e, 0x0e][..],
            &[0xc4, 0xe2, 0x75, 0x2e, 0x06],
        ]
        .concat();
        check(&code, |state| state.gpr[RSI] = PAGE_END - 13);
    }

    #[test]
    fn masked_moves_leave_absent_pages_alone() {
        // vpmaskmovd ymm1, ymm0, [rsi] with the first element alone, the others being absent.
        check(&[0xc4, 0xe2, 0x7d, 0x8c, 0x0e], |state| {
            state.xsave[160..176].fill(0);
            state.xsave[UPPER..UPPER + 16].fill(0);
            state.xsave[163] = 0x80;
            state.gpr[RSI] = LAST_BYTE - 3;
        });
    }

    #[test]
    fn misaligned_vectors_fault_before_their_pages_do() {
        // movaps xmm0, [rsi] where nothing is.
        check(&[0x0f, 0x28, 0x06], |state| state.gpr[RSI] = LAST_BYTE + 2);
    }

    #[test]
    fn a_misaligned_aligned_store_across_pages_is_a_fault_of_the_guest() {
        // vmovaps [rsi], ymm0.
        check(&[0xc5, 0xfc, 0x29, 0x06], |state| {
            state.gpr[RSI] = PAGE_END - 5;
        });
    }

    #[test]
    fn instructions_that_the_processor_lacks_are_undefined() {
        // femms.
        check(&[0x0f, 0x0e], |_| {});
    }

    #[test]
    fn ud1_is_undefined_with_a_memory_operand_too() {
        check(&[0x67, 0x0f, 0xb9, 0x06], |state| state.gpr[RSI] = DATA);
    }

    #[test]
    fn rdssp_does_nothing() {
        check(&[0xf3, 0x48, 0x0f, 0x1e, 0xc8], |_| {});
    }

    #[test]
    fn a_stack_address_that_is_not_canonical_is_a_stack_fault() {
        // movsd [rsp], xmm0; the other half of the test pushes.
        for code in [&[0xf2, 0x0f, 0x11, 0x04, 0x24][..], &[0x55]] {
            check(code, |state| state.gpr[RSP] = 0x0040_0000_3800_1b00);
        }
    }

    /// An address whose page number, cut to 47 bits, is a page that is there.
    const ALIAS: u64 = 0x6d48_0000_0000_0000;

    #[test]
    fn an_access_across_pages_at_an_alias_is_a_fault() {
        // mov rax, [rsi] from an aligned word first, so that the pages are known.
        let code = [
            &[0x48, 0x8b, 0x07][..],
            &[0x48, 0x8b, 0x47, 0x10],
            &[0x48, 0x8b, 0x06],
        ]
        .concat();
        check(&code, |state| {
            state.gpr[RDI] = PAGE_END - 8;
            state.gpr[RSI] = ALIAS + PAGE_END - 3;
        });
    }

    #[test]
    fn strings_at_an_alias_fault_with_their_registers_intact() {
        // mov rax, [rdi]; mov [rdi], rax; rep movsb / rep stosb.
        for string in [0xa4, 0xaa] {
            let code = [
                0x48, 0x8b, 0x07, 0x48, 0x89, 0x07, 0x48, 0x8b, 0xfe, 0xf3, string,
            ];
            check(&code, |state| {
                state.gpr[1] = 5;
                state.gpr[RDI] = DATA + 0x20;
                state.gpr[RSI] = ALIAS + DATA + 0x20;
            });
        }
    }

    #[test]
    fn leave_at_an_alias_keeps_the_stack_pointer() {
        // mov rax, [rdi]; leave.
        check(&[0x48, 0x8b, 0x07, 0xc9], |state| {
            state.gpr[RDI] = DATA + 0x20;
            state.gpr[5] = ALIAS + DATA + 0x28;
        });
    }

    #[test]
    fn bit_strings_wrap_at_the_width_of_their_address() {
        // bts [r14d - 8], r13.
        check(&[0x67, 0x4d, 0x0f, 0xab, 0x6e, 0xf8], |state| {
            state.gpr[R13] = 0xa0cf_bf8d_a194_91cb;
            state.gpr[R14] = 0x3000_79b8;
        });
    }

    #[test]
    fn a_repeated_instruction_is_single_stepped_by_elements() {
        // push 0x302; popfq; rep movsb.
        let code = [0x68, 0x02, 0x03, 0, 0, 0x9d, 0xf3, 0xa4];
        check(&code, |state| {
            state.gpr[1] = 5;
            state.gpr[RSI] = DATA;
            state.gpr[RDI] = DATA + 0x100;
        });
    }

    #[test]
    fn a_breakpoint_instruction_is_not_single_stepped() {
        // push 0x302; popfq; and the end, int3.
        check(&[0x68, 0x02, 0x03, 0, 0, 0x9d], |_| {});
    }

    #[test]
    fn an_x87_store_with_its_error_unmasked_leaves_memory() {
        // fistp qword ptr [rsi] of an empty register, in and across a page.
        for address in [DATA + 8, PAGE_END - 3] {
            check(&[0xdf, 0x3e], |state| {
                state.xsave[0] = 0x7e;
                state.gpr[RSI] = address;
            });
        }
    }

    #[test]
    fn an_earlier_x87_error_comes_before_a_page_fault() {
        // fld of an empty register by way of fxch, then fadd dword ptr [rsi] where nothing is.
        check(&[0xd9, 0xc9, 0xd8, 0x06], |state| {
            state.xsave[0] = 0x7e;
            state.gpr[RSI] = LAST_BYTE + 1;
        });
    }

    #[test]
    fn an_earlier_x87_error_meets_an_mmx_store_across_pages() {
        // fxch with an empty register, then movq [rsi], mm0.
        check(&[0xd9, 0xc9, 0x0f, 0x7f, 0x06], |state| {
            state.xsave[0] = 0x7e;
            state.gpr[RSI] = PAGE_END - 3;
        });
    }

    #[test]
    fn high_byte_registers_keep_their_instructions_without_rex() {
        // mov ah, [rsi]; add [rdi + 8], bh; xchg [rsi], ch.
        let code = [&[0x8a, 0x26][..], &[0x00, 0x7f, 0x08], &[0x86, 0x2e]].concat();
        check(&code, |state| {
            state.gpr[RSI] = PAGE_END - 1;
            state.gpr[RDI] = DATA + 0x300;
            state.gpr[RBX] = 0x1234_5678;
            state.gpr[R11] = 1;
            state.gpr[R15] = 2;
        });
    }

    #[test]
    fn a_short_count_of_zero_shortens_registers_as_the_processor_does() {
        // rep movsd [edi], [esi]; rep stosb [edi]; repe cmpsb [esi], [edi].
        for string in [0xa5, 0xaa, 0xa6] {
            check(&[0x67, 0xf3, string], |state| {
                state.gpr[1] = 0x1234_5678_0000_0000;
                state.gpr[RSI] = 0x350c_8000_0000_0000 + DATA;
                state.gpr[RDI] = 0x350c_8000_0000_0000 + DATA;
            });
        }
    }

    #[test]
    fn instructions_that_the_processor_lacks_are_undefined_before_they_fault() {
        // movntsd [rsi], xmm1 (AMD); sm4rnds4 ymm1, ymm0, [rsi].
        for code in [
            &[0xf2, 0x0f, 0x2b, 0x0e][..],
            &[0xc4, 0xe2, 0x7f, 0xda, 0x0e],
        ] {
            check(code, |state| state.gpr[RSI] = LAST_BYTE + 1);
        }
    }

    #[test]
    fn misaligned_hashes_fault_as_the_processor_has_it() {
        // sha1nexte xmm1, [rsi].
        for address in [DATA + 8, DATA + 5, PAGE_END - 8, LAST_BYTE + 2] {
            check(&[0x0f, 0x38, 0xc8, 0x0e], |state| state.gpr[RSI] = address);
        }
    }

    #[test]
    fn newer_instructions_run_where_the_processor_has_them() {
        let codes = [
            // vpdpwssd ymm1, ymm2, [rsi]; vpmadd52luq ymm1, ymm2, [rsi].
            &[0xc4, 0xe2, 0x6d, 0x52, 0x0e][..],
            &[0xc4, 0xe2, 0xed, 0xb4, 0x0e],
            // vpdpbssd ymm1, ymm2, [rsi]; vbcstnebf162ps ymm1, [rsi].
            &[0xc4, 0xe2, 0x6f, 0x50, 0x0e],
            &[0xc4, 0xe2, 0x7e, 0xb1, 0x0e],
            // movdiri [rsi], rbx; serialize; cldemote [rsi].
            &[0x48, 0x0f, 0x38, 0xf9, 0x1e],
            &[0x0f, 0x01, 0xe8],
            &[0x0f, 0x1c, 0x06],
        ];
        for code in codes {
            for address in [DATA + 0x40, PAGE_END - 8, PAGE_END - 3] {
                check(code, |state| state.gpr[RSI] = address);
            }
        }
    }

    #[test]
    fn an_mmx_store_to_no_page_leaves_its_registers() {
        // movd [rsi], mm4 with the stack's top elsewhere.
        check(&[0x0f, 0x7e, 0x26], |state| {
            state.xsave[3] = 0x31;
            state.gpr[RSI] = LAST_BYTE + 1;
        });
    }

    #[test]
    fn a_converting_store_to_no_page_faults() {
        // vcvtps2ph [rsi], ymm0, 0.
        check(&[0xc4, 0xe3, 0x7d, 0x1d, 0x06, 0], |state| {
            state.gpr[RSI] = LAST_BYTE - 3;
        });
    }
}
