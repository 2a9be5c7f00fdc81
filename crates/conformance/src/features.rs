//! CPUID features that bodies depend on (SDM 2A, CPUID).

use crate::guest::Feature;

/// RDTSCP.
pub const RDTSCP: Feature = Feature(0x8000_0001, 0, 3, 27);
/// 1 GiB pages.
pub const HUGE_PAGES: Feature = Feature(0x8000_0001, 0, 3, 26);
/// Process-context identifiers.
pub const PCID: Feature = Feature(1, 0, 2, 17);
/// XSAVE.
pub const XSAVE: Feature = Feature(1, 0, 2, 26);
/// AVX.
pub const AVX: Feature = Feature(1, 0, 2, 28);
/// RDFSBASE and so on.
pub const FSGSBASE: Feature = Feature(7, 0, 1, 0);
/// Supervisor-mode execution prevention.
pub const SMEP: Feature = Feature(7, 0, 1, 7);
/// INVPCID.
pub const INVPCID: Feature = Feature(7, 0, 1, 10);
/// Supervisor-mode access prevention.
pub const SMAP: Feature = Feature(7, 0, 1, 20);
/// User-mode instruction prevention.
pub const UMIP: Feature = Feature(7, 0, 2, 2);
/// A hypercall that ends another processor's HLT (Documentation/virt/kvm/x86/hypercalls).
pub const PV_UNHALT: Feature = Feature(0x4000_0001, 0, 0, 7);
/// x2APIC mode.
pub const X2APIC: Feature = Feature(1, 0, 2, 21);
/// The APIC timer's TSC-deadline mode.
pub const TSC_DEADLINE: Feature = Feature(1, 0, 2, 24);
