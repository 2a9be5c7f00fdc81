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
pub(super) struct Named {
    mac: String,
}

impl Subject {
    /// Puts a network card in. Its descriptors are named by their place beside the request.
    pub(super) fn add_card(&mut self, net: &NetConfig, fds: Vec<OwnedFd>) -> Answer {
        config::check_net("params", net).map_err(|error| Refusal::config(error.to_string()))?;
        let mut cards = self.devices.iter().filter_map(|one| one.card);
        if let Some(card) = cards.find(|card| card.mac == net.mac) {
            let message = format!("mac: the machine has a card {} already", card.address());
            return Err(Refusal::config(message));
        }
        let board = self.machine.board();
        // Filters can't be widened any more.
        let memory = self.vhost.then(|| board.ram().memory());
        let (device, card) =
            make_net(net, &mut Descriptors::of_message(fds), memory).map_err(|failure| {
                let (kind, message) = failure.into_parts();
                Refusal { kind, message }
            })?;
        let pci = board.pci();
        let address = pci.free_address().map_err(MachineError::from)?;
        let connections = Connections {
            memory: board.ram().memory().clone(),
            interrupts: Arc::clone(board.interrupts()),
            events: Arc::clone(board.events()),
            vm: self.doorbells.then(|| Arc::clone(board.vm())),
            intx: Some(board.intx().pin(address)),
        };
        let device = VirtioPci::new(device, connections).map_err(|error| Refusal {
            kind: error.kind(),
            message: error.to_string(),
        })?;
        pci.insert(address, &device.as_pci())
            .map_err(MachineError::from)?;
        let name = format!("net{}", card.address());
        self.devices.push(PlacedDevice {
            name: name.clone(),
            pci: device,
            address,
            card: Some(card),
        });
        let mut answer = card.describe(&name);
        answer["address"] = address.to_string().into();
        Ok(answer)
    }

    /// Takes a network card out.
    pub(super) fn remove_card(&mut self, card: &Named) -> Result<(), Refusal> {
        let place = self
            .devices
            .iter()
            .position(|one| one.card.is_some_and(|one| one.address() == card.mac));
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
