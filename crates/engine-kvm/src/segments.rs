//! Segment and descriptor-table registers between KVM's form and ours.

use kvm_bindings::kvm_dtable;
use kvm_bindings::kvm_segment;
use ringfence_x86::state::ACCESS_UNUSABLE;
use ringfence_x86::state::DescriptorTable;
use ringfence_x86::state::Segment;

const TYPE_MASK: u32 = 0xf;
const S: u32 = 4;
const DPL: u32 = 5;
const P: u32 = 7;
const AVL: u32 = 12;
const L: u32 = 13;
const DB: u32 = 14;
const G: u32 = 15;

fn bit(access: u32, position: u32) -> u8 {
    u8::from(access >> position & 1 != 0)
}

pub(crate) fn to_kvm(segment: &Segment) -> kvm_segment {
    let access = segment.access;
    kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: (access & TYPE_MASK).to_le_bytes()[0],
        present: bit(access, P),
        dpl: segment.dpl(),
        db: bit(access, DB),
        s: bit(access, S),
        l: bit(access, L),
        g: bit(access, G),
        avl: bit(access, AVL),
        unusable: u8::from(access & ACCESS_UNUSABLE != 0),
        padding: 0,
    }
}

pub(crate) fn from_kvm(segment: &kvm_segment) -> Segment {
    let access = u32::from(segment.type_) & TYPE_MASK
        | u32::from(segment.s) << S
        | u32::from(segment.dpl) << DPL
        | u32::from(segment.present) << P
        | u32::from(segment.avl) << AVL
        | u32::from(segment.l) << L
        | u32::from(segment.db) << DB
        | u32::from(segment.g) << G;
    // KVM calls a segment unusable that isn't present; AMD's form has no such bit of its own.
    let unusable = if segment.unusable != 0 {
        ACCESS_UNUSABLE
    } else {
        0
    };
    Segment {
        selector: segment.selector,
        base: segment.base,
        limit: segment.limit,
        access: access | unusable,
    }
}

pub(crate) fn table_to_kvm(table: &DescriptorTable) -> kvm_dtable {
    kvm_dtable {
        base: table.base,
        limit: table.limit,
        padding: [0; 3],
    }
}

pub(crate) fn table_from_kvm(table: &kvm_dtable) -> DescriptorTable {
    DescriptorTable {
        base: table.base,
        limit: table.limit,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_access_bit_survives_both_ways() {
        for bit in (0..8).chain(12..17) {
            let segment = Segment {
                selector: 0x2b,
                base: 0xffff_8000_1234_5000,
                limit: 0xf_ffff,
                access: 1 << bit,
            };
            assert_eq!(from_kvm(&to_kvm(&segment)), segment, "bit {bit}");
        }
    }
}
