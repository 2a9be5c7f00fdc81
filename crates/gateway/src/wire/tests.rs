//! Frames taken apart again by an independent implementation.

use std::io::IoSlice;
use std::net::SocketAddr;

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::Icmpv4Packet;
use smoltcp::wire::IpAddress;
use smoltcp::wire::Ipv4Packet;
use smoltcp::wire::Ipv4Repr;
use smoltcp::wire::Ipv6Packet;
use smoltcp::wire::TcpPacket;
use smoltcp::wire::UdpPacket;

use super::*;

const A: Mac = [2, 0, 0, 0, 0, 1];
const B: Mac = [2, 0, 0, 0, 0, 2];

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

fn whole(builder: &mut Builder, payload: &[u8]) -> Vec<u8> {
    let mut frame = builder.headers().to_vec();
    frame.extend_from_slice(payload);
    frame.split_off(VNET_BYTES)
}

#[test]
fn tcp_over_both_versions_has_good_checksums() {
    let mut header = vec![0; 20];
    header[12] = 5 << 4;
    header[13] = 0x10;
    for (from, to) in [
        ("10.0.2.2:80", "10.0.2.15:4000"),
        ("[fd00::2]:80", "[fd00::15]:4000"),
    ] {
        let (from, to) = (address(from), address(to));
        header[..2].copy_from_slice(&from.port().to_be_bytes());
        let payload = [1, 2, 3, 4, 5, 6, 7];
        let parts = [IoSlice::new(&payload[..3]), IoSlice::new(&payload[3..])];
        let mut builder = Builder::tcp((A, B), from, to, &header, &parts, (false, None));
        let frame = whole(&mut builder, &payload);
        let ethernet = Ethernet::parse(&frame).expect("a frame");
        assert_eq!((ethernet.source, ethernet.destination), (A, B));
        let packet = IpPacket::parse(&ethernet).expect("a packet");
        assert_eq!((packet.source, packet.destination), (from.ip(), to.ip()));
        let segment = TcpPacket::new_checked(packet.payload).expect("a segment");
        let ends = (IpAddress::from(from.ip()), IpAddress::from(to.ip()));
        assert!(segment.verify_checksum(&ends.0, &ends.1));
        assert_eq!(segment.payload(), payload);
        if from.is_ipv4() {
            let checked = Ipv4Packet::new_checked(ethernet.payload).expect("a packet");
            Ipv4Repr::parse(&checked, &ChecksumCapabilities::default()).expect("a good header");
        } else {
            Ipv6Packet::new_checked(ethernet.payload).expect("a packet");
        }
    }
}

#[test]
fn udp_over_both_versions_has_good_checksums() {
    for (from, to) in [
        ("10.0.2.2:53", "10.0.2.15:4000"),
        ("[fd00::2]:53", "[fd00::15]:4000"),
    ] {
        let (from, to) = (address(from), address(to));
        for len in 0..40 {
            let payload: Vec<u8> = (0..len).collect();
            let frame = whole(
                &mut Builder::udp((A, B), from, to, &payload, false),
                &payload,
            );
            let ethernet = Ethernet::parse(&frame).expect("a frame");
            let packet = IpPacket::parse(&ethernet).expect("a packet");
            let datagram = UdpPacket::new_checked(packet.payload).expect("a datagram");
            let ends = (IpAddress::from(from.ip()), IpAddress::from(to.ip()));
            assert!(datagram.verify_checksum(&ends.0, &ends.1));
            let own = UdpDatagram::parse(packet.payload).expect("a datagram");
            assert_eq!((own.source, own.destination), (53, 4000));
            assert_eq!(own.payload, payload);
        }
    }
}

#[test]
fn large_segments_say_how_to_split_them() {
    let (from, to) = (address("[fd00::2]:80"), address("[fd00::15]:4000"));
    let payload = vec![7; 5000];
    let how = (
        true,
        Some(Large {
            segment_bytes: 1000,
        }),
    );
    let header = [0; 20];
    let mut builder = Builder::tcp((A, B), from, to, &header, &[IoSlice::new(&payload)], how);
    let vnet = VnetHeader::parse(builder.headers()).expect("a header");
    assert_eq!(vnet.gso_type, VnetHeader::GSO_TCPV6);
    assert_eq!((vnet.gso_size, vnet.hdr_len), (1000, 74));
    assert_eq!((vnet.csum_start, vnet.csum_offset), (54, 16));
}

#[test]
fn an_icmp_error_quotes_the_packet() {
    let (from, to) = (address("10.0.2.15:9"), address("10.0.9.9:9"));
    let frame = whole(
        &mut Builder::udp((A, B), from, to, b"hello", false),
        b"hello",
    );
    let ethernet = Ethernet::parse(&frame).expect("a frame");
    let packet = IpPacket::parse(&ethernet).expect("a packet");
    let message = icmp_error(&packet, 3, 13, to.ip());
    let checked = Icmpv4Packet::new_checked(&message[..]).expect("a message");
    assert!(checked.verify_checksum());
    assert_eq!(&message[8..], packet.whole);
}

#[test]
fn what_is_cut_short_or_lies_about_its_length_is_refused() {
    let (from, to) = (address("10.0.2.15:9"), address("10.0.9.9:9"));
    let good = whole(
        &mut Builder::udp((A, B), from, to, b"hello", false),
        b"hello",
    );
    for len in 0..good.len() {
        let Some(ethernet) = Ethernet::parse(&good[..len]) else {
            continue;
        };
        assert!(IpPacket::parse(&ethernet).is_err(), "{len}");
    }
    let mut fragment = good;
    fragment[ETHERNET_BYTES + 6] = 0x20;
    let ethernet = Ethernet::parse(&fragment).expect("a frame");
    assert_eq!(IpPacket::parse(&ethernet).err(), Some(NotIp::Fragment));
}

#[test]
fn options_end_wherever_they_end() {
    let mut data = vec![0; 40];
    data[12] = 10 << 4;
    data[20..28].copy_from_slice(&[2, 4, 5, 0xb4, 1, 3, 3, 9]);
    let segment = TcpSegment::parse(&data).expect("a segment");
    let both = TcpOptions {
        mss: Some(1460),
        window_scale: Some(9),
    };
    assert_eq!(segment.options(), both);
    for lie in [0, 1, 255] {
        data[21] = lie;
        let segment = TcpSegment::parse(&data).expect("a segment");
        assert_eq!(segment.options(), TcpOptions::default());
    }
}
