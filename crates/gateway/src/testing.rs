//! For tests and fuzzing: a gateway without a process around it.

use std::net::IpAddr;
use std::os::fd::OwnedFd;

use crate::Gateway;
use crate::config;
use crate::config::LinkKind;
use crate::config::PortConfig;
use crate::config::RateConfig;
use crate::fds::Fds;

type AnyError = Box<dyn std::error::Error + Send + Sync>;

impl Gateway {
    /// The gateway of a document that names no descriptors.
    ///
    /// # Errors
    /// When the document is no good.
    pub fn for_tests(document: &str) -> Result<Self, AnyError> {
        let config = config::parse(document.as_bytes())?;
        Self::new(&config, &mut Fds::default())
    }

    /// Adds a link over a socket.
    ///
    /// # Errors
    /// When it can't be.
    pub fn add_test_port(
        &mut self,
        name: &str,
        mac: [u8; 6],
        addresses: &[IpAddr],
        link: OwnedFd,
    ) -> Result<(), AnyError> {
        let port = PortConfig {
            name: name.to_owned(),
            fd: 0,
            link: LinkKind::Socket,
            mac,
            addresses: addresses.to_vec(),
            hostname: String::new(),
            rate: RateConfig::default(),
            policy: None,
        };
        self.add_port(&port, link)
    }

    /// Bytes that connections keep.
    #[must_use]
    pub fn buffered(&self) -> usize {
        self.world.budget.used
    }
}
