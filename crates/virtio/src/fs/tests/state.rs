//! Snapshots.

use ringfence_device::Persist;

use super::client::Client;
use super::client::ROOT;
use super::client::device;
use super::client::share;
use crate::fs::Layout;
use crate::testing::TestDriver;

#[test]
fn a_restored_guest_finds_its_files_open() {
    let mut client = Client::writable();
    std::fs::create_dir(client.path("d")).expect("host");
    std::fs::write(client.path("d/f"), b"before and after").expect("host");
    let node = client.walk("d/f").expect("there");
    let handle = client.open(node, 2).expect("open");
    let state = client.driver.pci.save();
    let layout = Layout::single(share(client.dir.path())).expect("a layout");
    let ram = client.driver.ram.clone();
    let mut restored = TestDriver::reset(device(layout));
    let mut bytes = vec![0; 9 << 20];
    let start = ringfence_memory::GuestAddress(0);
    vm_memory::Bytes::read_slice(ram.memory(), &mut bytes, start).expect("ram");
    vm_memory::Bytes::write_slice(restored.memory(), &bytes, start).expect("ram");
    restored.pci.restore(state).expect("same device");
    restored.rings = std::mem::take(&mut client.driver.rings);
    client.driver = restored;
    assert_eq!(client.read(node, handle, 7, 9).expect("open"), b"and after");
    assert_eq!(client.lookup(ROOT, "d").expect("there"), node - 1);
}
