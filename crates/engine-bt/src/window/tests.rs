use super::*;

fn windows() -> Windows {
    let blocks = memory_file(c"test-blocks", BLOCKS_BYTES as u64).expect("memfd");
    Windows::new(3, &blocks, 0x1000).expect("windows")
}

const KERNEL: u64 = 0xffff_8880_0012_3000;
const USER: u64 = 0x7fff_1234_5000;

#[test]
fn addresses_and_indices_convert_both_ways() {
    for address in [
        0,
        USER,
        KERNEL,
        0xffff_ffff_ffff_f000,
        0xffff_8000_0000_0000,
    ] {
        assert_eq!(page_address(page_index(address)), address);
    }
}

#[test]
fn the_kernel_half_is_in_every_window_and_the_user_half_in_one() {
    let mut windows = windows();
    windows.select(1);
    windows.fill(Table::Read, page_index(KERNEL), 0x1000, true);
    windows.fill(Table::Read, page_index(USER), 0x2000, false);
    windows.select(2);
    assert_eq!(windows.get(Table::Read, page_index(KERNEL)), 0x1000);
    assert_eq!(windows.get(Table::Read, page_index(USER)), 0);
    windows.select(1);
    assert_eq!(windows.get(Table::Read, page_index(USER)), 0x2000);
}

#[test]
fn a_fourth_tag_takes_the_oldest_window_and_finds_it_empty() {
    let mut windows = windows();
    for tag in 1..=3 {
        windows.select(tag);
        windows.fill(Table::Write, page_index(USER), tag, false);
    }
    windows.select(1);
    windows.select(4);
    assert_eq!(windows.get(Table::Write, page_index(USER)), 0);
    windows.select(3);
    assert_eq!(windows.get(Table::Write, page_index(USER)), 3);
    windows.select(2);
    assert_eq!(windows.get(Table::Write, page_index(USER)), 0);
}

#[test]
fn local_kernel_entries_go_with_the_address_space_and_global_ones_stay() {
    let mut windows = windows();
    windows.select(1);
    windows.fill(Table::Read, page_index(KERNEL), 1, true);
    windows.fill(Table::Read, page_index(KERNEL) + 1, 2, false);
    windows.flush_current();
    assert_eq!(windows.get(Table::Read, page_index(KERNEL)), 1);
    assert_eq!(windows.get(Table::Read, page_index(KERNEL) + 1), 0);
    windows.flush_everything();
    assert_eq!(windows.get(Table::Read, page_index(KERNEL)), 0);
}

#[test]
fn invalidating_a_page_of_a_region_drops_the_region() {
    let mut windows = windows();
    windows.select(1);
    let index = page_index(KERNEL);
    windows.fill_region(index, 0x4000, true, Some(&|page| page != 7));
    let first = index / REGION_PAGES * REGION_PAGES;
    assert_eq!(windows.get(Table::Write, first + 7), 0);
    assert_eq!(windows.get(Table::Read, first + 7), 0x4000);
    windows.flush_page(page_address(first + 400));
    assert_eq!(windows.get(Table::Read, first + 7), 0);
}

#[test]
fn revoking_writes_finds_single_pages_and_regions() {
    let mut windows = windows();
    windows.select(1);
    let host = 0x7000_0000_5000_u64;
    windows.fill(
        Table::Write,
        page_index(USER),
        host.wrapping_sub(USER),
        false,
    );
    let large = 0xffff_8880_0020_0000_u64;
    let addend = (host - 0x5000).wrapping_sub(large);
    windows.fill_region(page_index(large), addend, true, Some(&|_| true));
    windows.select(2);
    assert!(windows.revoke_writes(host));
    assert_eq!(windows.get(Table::Write, page_index(large + 0x5000)), 0);
    assert_eq!(
        windows.get(Table::Write, page_index(large + 0x6000)),
        addend
    );
    windows.select(1);
    assert_eq!(windows.get(Table::Write, page_index(USER)), 0);
    assert!(!windows.revoke_writes(host));
}

#[test]
fn polluted_user_halves_are_dropped_before_user_code_runs() {
    let mut windows = windows();
    windows.select(1);
    windows.fill(Table::Read, page_index(USER), 5, false);
    windows.enter_user();
    assert_eq!(windows.get(Table::Read, page_index(USER)), 5);
    windows.pollute();
    windows.enter_user();
    assert_eq!(windows.get(Table::Read, page_index(USER)), 0);
}
