//! Landlock: no file access but below the shared directories.

use std::os::fd::OwnedFd;

use landlock::ABI;
use landlock::Access as _;
use landlock::AccessFs;
use landlock::BitFlags;
use landlock::CompatLevel;
use landlock::Compatible;
use landlock::PathBeneath;
use landlock::Ruleset;
use landlock::RulesetAttr;
use landlock::RulesetCreatedAttr;
use landlock::RulesetStatus;

use super::Access;
use super::Layer;

/// The newest rights that this program knows; an older kernel has fewer.
const NEWEST: ABI = ABI::V5;

/// A directory or file that stays in reach.
#[derive(Debug)]
pub(crate) struct Reach {
    pub(super) fd: OwnedFd,
    pub(super) access: Access,
}

impl Reach {
    /// Never programs or device nodes, whatever the share may do.
    fn rights(&self) -> BitFlags<AccessFs> {
        let read = AccessFs::ReadFile | AccessFs::ReadDir;
        let write = AccessFs::WriteFile
            | AccessFs::Truncate
            | AccessFs::MakeReg
            | AccessFs::MakeDir
            | AccessFs::MakeSym
            | AccessFs::MakeFifo
            | AccessFs::MakeSock
            | AccessFs::RemoveFile
            | AccessFs::RemoveDir
            | AccessFs::Refer;
        match self.access {
            Access::Read => read,
            Access::Write => read | write,
        }
    }
}

/// Restricts the calling thread and those that it starts.
pub(super) fn restrict(reach: &[Reach]) -> Layer {
    match try_restrict(reach) {
        Ok(RulesetStatus::NotEnforced) => Layer::Off("this kernel has no Landlock".to_owned()),
        Ok(_) => Layer::On,
        Err(error) => Layer::Off(error.to_string()),
    }
}

fn try_restrict(reach: &[Reach]) -> Result<RulesetStatus, landlock::RulesetError> {
    let rules = reach.iter().map(|reach| {
        let rule = PathBeneath::new(&reach.fd, reach.rights());
        Ok::<_, landlock::RulesetError>(rule.set_compatibility(CompatLevel::BestEffort))
    });
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .create()?
        .add_rules(rules)?
        .restrict_self()?;
    Ok(status.ruleset)
}
