//! CPUID as a table (SDM 2A, CPUID instruction).

use std::collections::BTreeMap;

/// What one CPUID execution returns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuidResult {
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

/// The leaves a guest sees: `(leaf, subleaf)` to result. Leaves without subleaves use subleaf 0.
///
/// Engines start from what they can run, [`CpuidTable`]'s owner filters it, and the machine adds
/// what depends on the board (topology, the paravirtual leaves).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuidTable {
    leaves: BTreeMap<(u32, u32), CpuidResult>,
}

impl CpuidTable {
    /// Sets a leaf.
    pub fn set(&mut self, leaf: u32, subleaf: u32, result: CpuidResult) {
        self.leaves.insert((leaf, subleaf), result);
    }

    /// Removes a leaf with all its subleaves.
    pub fn remove(&mut self, leaf: u32) {
        self.leaves.retain(|&(number, _), _| number != leaf);
    }

    /// Takes the local APIC, its x2APIC mode and its TSC deadline away, for a bare machine.
    pub fn hide_local_apic(&mut self) {
        const APIC: u32 = 1 << 9;
        const X2APIC_AND_TSC_DEADLINE: u32 = 1 << 21 | 1 << 24;
        if let Some(features) = self.get_mut(1, 0) {
            features.edx &= !APIC;
            features.ecx &= !X2APIC_AND_TSC_DEADLINE;
        }
    }

    /// The entry exactly as stored.
    #[must_use]
    pub fn get(&self, leaf: u32, subleaf: u32) -> Option<&CpuidResult> {
        self.leaves.get(&(leaf, subleaf))
    }

    /// The entry, to change it in place.
    pub fn get_mut(&mut self, leaf: u32, subleaf: u32) -> Option<&mut CpuidResult> {
        self.leaves.get_mut(&(leaf, subleaf))
    }

    /// All entries in order.
    pub fn iter(&self) -> impl Iterator<Item = ((u32, u32), CpuidResult)> + '_ {
        self.leaves.iter().map(|(&key, &value)| (key, value))
    }

    /// Whether the leaf has more than subleaf 0.
    #[must_use]
    pub fn has_subleaves(&self, leaf: u32) -> bool {
        self.leaves
            .range((leaf, 1)..=(leaf, u32::MAX))
            .next()
            .is_some()
    }
}
