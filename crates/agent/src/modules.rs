//! Loads the kernel modules that the initramfs carries, each behind those that it needs.

use crate::error::AgentError;
use crate::error::Tried;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::io::Errno;
use std::collections::HashMap;
use std::collections::HashSet;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

#[derive(Debug)]
struct Module {
    file: String,
    needs: Vec<String>,
}

/// The modules there are. It keeps their directory open, so that they can be loaded when the
/// initramfs is out of sight.
#[derive(Debug)]
pub(crate) struct Modules {
    folder: OwnedFd,
    index: HashMap<String, Module>,
    loaded: HashSet<String>,
}

impl Modules {
    /// Reads the list in `folder`: a line for each has its name, file and the names that it needs.
    ///
    /// # Errors
    ///
    /// There is no list.
    pub(crate) fn open(folder: &Path) -> Result<Self, AgentError> {
        let what = || format!("cannot read the list of modules in {}", folder.display());
        let text = fs::read_to_string(folder.join("modules")).tried(what)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let index = text.lines().filter_map(|line| {
            let mut words = line.split(' ').map(str::to_owned);
            let (name, file) = (words.next()?, words.next()?);
            let needs = words.collect();
            Some((name, Module { file, needs }))
        });
        Ok(Self {
            index: index.collect(),
            folder: rustix::fs::open(folder, flags, Mode::empty()).tried(what)?,
            loaded: HashSet::new(),
        })
    }

    /// Loads a module and what it needs. One that isn't listed is built into the kernel, or what
    /// needs it fails and says so.
    ///
    /// # Errors
    ///
    /// The kernel refuses it.
    pub(crate) fn load(&mut self, name: &str) -> Result<(), AgentError> {
        if self.loaded.contains(name) {
            return Ok(());
        }
        let Some(module) = self.index.remove(name) else {
            return Ok(());
        };
        for needed in &module.needs {
            self.load(needed)?;
        }
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let what = || format!("cannot load the kernel module {name}");
        let file = rustix::fs::openat(&self.folder, module.file.as_str(), flags, Mode::empty());
        match rustix::system::finit_module(&file.tried(what)?, c"", 0) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(AgentError::errno(what(), errno)),
        }
        self.loaded.insert(name.to_owned());
        Ok(())
    }

    /// Loads the drivers of the virtio devices on the bus that are among `wanted`.
    ///
    /// # Errors
    ///
    /// The kernel refuses one.
    pub(crate) fn load_drivers(&mut self, wanted: &[(u32, &str)]) -> Result<(), AgentError> {
        let present = virtio_devices();
        for (kind, name) in wanted {
            if present.contains(kind) {
                self.load(name)?;
            }
        }
        Ok(())
    }
}

/// The device IDs (virtio 1.2 §5) on the PCI bus (§4.1.2: 0x1040 and the ID).
fn virtio_devices() -> HashSet<u32> {
    let Ok(entries) = fs::read_dir("/sys/bus/pci/devices") else {
        return HashSet::new();
    };
    let number = |path: &Path| {
        let text = fs::read_to_string(path).ok()?;
        u32::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok()
    };
    let devices = entries.filter_map(|entry| {
        let path = entry.ok()?.path();
        let device = number(&path.join("device"))?;
        (number(&path.join("vendor"))? == 0x1AF4).then(|| device.checked_sub(0x1040))?
    });
    devices.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_read_and_what_is_not_listed_is_built_in() {
        let folder = tempfile::tempdir().expect("a directory");
        let list = "virtio virtio.ko\nvirtio_pci virtio_pci.ko virtio virtio_ring\n\n";
        fs::write(folder.path().join("modules"), list).expect("written");
        let mut modules = Modules::open(folder.path()).expect("a list");
        assert_eq!(modules.index["virtio_pci"].needs, ["virtio", "virtio_ring"]);
        assert_eq!(modules.load("ext4"), Ok(()));
        // Its file isn't there, which is said with its name.
        let error = modules.load("virtio").expect_err("no file");
        assert!(error.message.contains("virtio"), "{error}");
    }
}
