//! Network cards that are put in and taken out while the machine runs.
//!
//! The guest finds a card when it looks at its bus again, and is told to let go of one before it is
//! taken out (both by the agent); a guest that doesn't loses it all the same.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use ringfence_engine::ErrorKind;
use ringfence_machine::MachineError;
use ringfence_pci::PciDevice;
use ringfence_virtio::pci::Connections;
use ringfence_virtio::pci::VirtioPci;
use serde::Deserialize;
use serde_json::json;

use super::Subject;
use super::methods::Answer;
use super::methods::Refusal;
use crate::assemble::PlacedDevice;
use crate::config;
use crate::config::NetConfig;
use crate::descriptors::Descriptors;
use crate::devices::make_net;

/// Which card.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Card {
    mac: String,
}

fn text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

impl Subject {
    /// Puts a network card in. Its descriptors are named by their place beside the request.
    pub(super) fn add_card(&mut self, net: &NetConfig, fds: Vec<OwnedFd>) -> Answer {
        config::check_net("params", net).map_err(|error| Refusal::config(error.to_string()))?;
        if self.devices.iter().any(|one| one.mac == Some(net.mac)) {
            let message = format!("mac: the machine has a card {} already", text(net.mac));
            return Err(Refusal::config(message));
        }
        let device = make_net(net, &mut Descriptors::of_message(fds)).map_err(|failure| {
            let (kind, message) = failure.into_parts();
            Refusal { kind, message }
        })?;
        let board = self.machine.board();
        let pci = board.pci();
        let address = pci.free_address().map_err(MachineError::from)?;
        let connections = Connections {
            memory: board.ram().memory().clone(),
            interrupts: Arc::clone(board.interrupts()),
            events: Arc::clone(board.events()),
            vm: self.doorbells.then(|| Arc::clone(board.vm())),
            intx: Some(board.intx().pin(address)),
        };
        let card = VirtioPci::new(device, connections).map_err(|error| Refusal {
            kind: error.kind(),
            message: error.to_string(),
        })?;
        pci.insert(address, &card.as_pci())
            .map_err(MachineError::from)?;
        let name = format!("net{}", text(net.mac));
        self.devices.push(PlacedDevice {
            name: name.clone(),
            pci: card,
            address,
            mac: Some(net.mac),
        });
        Ok(json!({ "name": name, "address": address.to_string() }))
    }

    /// Takes a network card out.
    pub(super) fn remove_card(&mut self, card: &Card) -> Result<(), Refusal> {
        let place = self
            .devices
            .iter()
            .position(|one| one.mac.map(text).as_deref() == Some(card.mac.as_str()));
        let Some(place) = place else {
            return Err(Refusal {
                kind: ErrorKind::State,
                message: format!("the machine has no card {}", card.mac),
            });
        };
        let device = self.devices.remove(place);
        self.machine
            .board()
            .pci()
            .remove(device.address)
            .map_err(MachineError::from)?;
        // Its queues and its link are let go of, whatever the guest still believes.
        PciDevice::reset(&*device.pci.as_pci());
        Ok(())
    }
}
