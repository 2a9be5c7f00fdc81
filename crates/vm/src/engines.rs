//! The engines that this program has, one line each.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use ringfence_clock::Clock;
use ringfence_engine::Engine;
use ringfence_engine::EngineError;

use crate::VmError;
use crate::config::ConfigError;
use crate::config::UserCode;

/// What an engine may need to open.
pub(crate) struct EngineContext {
    /// The machine's time.
    #[expect(dead_code, reason = "for engines without a clock of their own")]
    pub(crate) clock: Arc<Clock>,
    /// The engine's device, when the caller opened it.
    pub(crate) device: Option<OwnedFd>,
    /// How the guest's user code runs, where the engine has a choice.
    pub(crate) user_code: UserCode,
    /// Takes the names of translated code.
    pub(crate) perf_map: Option<File>,
    /// Takes translations.
    pub(crate) trace: Option<File>,
}

/// An engine: its name, the device that it needs by path, and how it is opened.
struct Entry {
    name: &'static str,
    device: Option<&'static str>,
    /// What it sets up and asks the host while the host's files are within reach.
    learn: fn(),
    open: fn(EngineContext) -> Result<Box<dyn Engine>, EngineError>,
}

const ENGINES: &[Entry] = &[
    #[cfg(feature = "bt")]
    Entry {
        name: "bt",
        device: None,
        learn: || {
            ringfence_engine_bt::learn_frequency();
            ringfence_engine_bt::report_crashes();
        },
        open: |context| {
            let mut engine =
                ringfence_engine_bt::BtEngine::new()?.with_direct(match context.user_code {
                    UserCode::Direct => ringfence_engine_bt::Direct::Earned,
                    UserCode::Translated => ringfence_engine_bt::Direct::Never,
                });
            if let Some(file) = context.perf_map {
                engine = engine.with_perf_map(file);
            }
            if let Some(file) = context.trace {
                engine = engine.with_trace(file);
            }
            Ok(Box::new(engine))
        },
    },
    #[cfg(feature = "kvm")]
    Entry {
        name: "kvm",
        device: Some("/dev/kvm"),
        learn: || {},
        open: |context| match context.device {
            Some(device) => Ok(Box::new(ringfence_engine_kvm::KvmEngine::from_fd(device)?)),
            None => Err(EngineError::Config("it needs /dev/kvm".to_owned())),
        },
    },
    #[cfg(feature = "testing")]
    Entry {
        name: "idle",
        device: None,
        learn: || {},
        open: |_| Ok(Box::new(ringfence_machine::testing::ScriptEngine::idle())),
    },
    #[cfg(feature = "testing")]
    Entry {
        name: "broken",
        device: None,
        learn: || {},
        open: |_| {
            let bug = |_: &_| Err(EngineError::Internal("two and two are five".to_owned()));
            let engine = ringfence_machine::testing::ScriptEngine::new(Arc::new(bug));
            Ok(Box::new(engine))
        },
    },
];

fn find(name: &str) -> Result<&'static Entry, VmError> {
    ENGINES
        .iter()
        .find(|entry| entry.name == name)
        .ok_or_else(|| {
            let known: Vec<_> = ENGINES.iter().map(|entry| entry.name).collect();
            let message = format!("there is no engine {name:?}; this program has {known:?}");
            ConfigError::field("engine", message).into()
        })
}

/// Has the engine of this name set up and ask the host what it can't once the jail closes.
pub(crate) fn learn(name: &str) -> Result<(), VmError> {
    (find(name)?.learn)();
    Ok(())
}

/// The device that the engine of this name needs by path.
pub(crate) fn device_path(name: &str) -> Result<Option<&'static str>, VmError> {
    Ok(find(name)?.device)
}

/// Opens the engine of this name.
pub(crate) fn open(name: &str, context: EngineContext) -> Result<Box<dyn Engine>, VmError> {
    (find(name)?.open)(context).map_err(|source| VmError::Engine {
        name: name.to_owned(),
        source,
    })
}
