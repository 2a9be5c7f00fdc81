//! Images against QEMU's own tools, which know the formats best (package qemu-utils).

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::fs::OpenOptions;
    use std::os::unix::fs::FileExt;
    use std::path::Path;
    use std::process::Command;

    use ringfence_block::Disk;
    use ringfence_block::DiskError;
    use ringfence_block::Format;
    use ringfence_block::Image;
    use ringfence_block::create_qcow2;
    use ringfence_block::create_raw;
    use ringfence_block::open;
    use ringfence_memory::GuestAddress;
    use ringfence_memory::GuestMemoryBackend;
    use ringfence_memory::GuestRam;
    use ringfence_memory::HugePages;
    use tempfile::TempDir;
    use vm_memory::Bytes;

    const MIB: u64 = 1 << 20;

    fn tool(program: &str, arguments: &[&str]) -> String {
        let output = Command::new(program)
            .args(arguments)
            .output()
            .unwrap_or_else(|error| panic!("{program} (package qemu-utils): {error}"));
        let text = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(output.status.success(), "{program} {arguments:?}: {text}");
        text
    }

    fn text(path: &Path) -> &str {
        path.to_str().expect("UTF-8")
    }

    fn file(path: &Path) -> File {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .expect("the image")
    }

    fn image(path: &Path, format: Format) -> Image {
        Image {
            file: file(path),
            format,
        }
    }

    fn qcow2(path: &Path) -> Box<dyn Disk> {
        open(image(path, Format::Qcow2), Vec::new(), false).expect("opens")
    }

    fn new_qcow2(dir: &TempDir, size: u64) -> std::path::PathBuf {
        let path = dir.path().join("disk.qcow2");
        let new = File::create_new(&path).expect("a file");
        drop(new);
        create_qcow2(file(&path), size, None).expect("made");
        path
    }

    /// Guest memory to read to and write from.
    struct Buffer(GuestRam);

    impl Buffer {
        fn new() -> Self {
            Self(GuestRam::new(4 * MIB, HugePages::Off).expect("ram"))
        }

        fn fill(&self, byte: u8, len: usize) {
            let data = vec![byte; len];
            self.0
                .memory()
                .write_slice(&data, GuestAddress(0))
                .expect("ram");
        }

        fn write(&self, disk: &dyn Disk, offset: u64, byte: u8, len: usize) {
            self.fill(byte, len);
            let slice = self.0.memory().get_slice(GuestAddress(0), len);
            disk.write(&[slice.expect("ram")], offset).expect("written");
        }

        fn read(&self, disk: &dyn Disk, offset: u64, len: usize) -> Vec<u8> {
            self.fill(0xee, len);
            let half = len / 2;
            let slice = |at: usize, len| {
                let at = GuestAddress(at as u64);
                self.0.memory().get_slice(at, len).expect("ram")
            };
            disk.read(&[slice(0, half), slice(half, len - half)], offset)
                .expect("read");
            let mut data = vec![0; len];
            self.0
                .memory()
                .read_slice(&mut data, GuestAddress(0))
                .expect("ram");
            data
        }
    }

    #[test]
    fn what_is_made_passes_the_check_and_has_its_size() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = new_qcow2(&dir, 3 * 1024 * MIB);
        tool("qemu-img", &["check", "-f", "qcow2", text(&path)]);
        let info = tool("qemu-img", &["info", "-f", "qcow2", text(&path)]);
        assert!(info.contains("(3221225472 bytes)"), "{info}");
        let raw = dir.path().join("disk.raw");
        create_raw(&File::create_new(&raw).expect("a file"), 5 * MIB).expect("made");
        assert_eq!(std::fs::metadata(&raw).expect("made").len(), 5 * MIB);
    }

    #[test]
    fn what_is_written_is_what_qemu_reads() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = new_qcow2(&dir, 64 * MIB);
        let disk = qcow2(&path);
        let buffer = Buffer::new();
        buffer.write(&*disk, 0, 0x11, 512);
        buffer.write(&*disk, 65_536 - 512, 0x22, 1024);
        buffer.write(&*disk, 40 * MIB, 0x33, 1 << 20);
        disk.write_zeroes(40 * MIB + 4096, 8192, false)
            .expect("zeroed");
        disk.flush().expect("flushed");
        drop(disk);
        tool("qemu-img", &["check", "-f", "qcow2", text(&path)]);
        for read in [
            "read -P 0x11 0 512",
            "read -P 0 512 512",
            "read -P 0x22 65024 1024",
            "read -P 0x33 41943040 4096",
            "read -P 0 41947136 8192",
            "read -P 0x33 41955328 4096",
        ] {
            let said = tool("qemu-io", &["-f", "qcow2", "-c", read, text(&path)]);
            assert!(!said.contains("failed"), "{read}: {said}");
        }
    }

    #[test]
    fn what_qemu_writes_is_read_compressed_too() {
        let dir = tempfile::tempdir().expect("a directory");
        let plain = dir.path().join("plain.qcow2");
        let packed = dir.path().join("packed.qcow2");
        tool("qemu-img", &["create", "-f", "qcow2", text(&plain), "64M"]);
        let write = "write -P 0x44 1M 300k";
        tool("qemu-io", &["-f", "qcow2", "-c", write, text(&plain)]);
        let convert = ["convert", "-c", "-f", "qcow2", "-O", "qcow2"];
        tool(
            "qemu-img",
            &[&convert[..], &[text(&plain), text(&packed)]].concat(),
        );
        let buffer = Buffer::new();
        for path in [&plain, &packed] {
            let disk = qcow2(path);
            let data = buffer.read(&*disk, MIB - 512, 1024);
            assert!(data[..512].iter().all(|&byte| byte == 0));
            assert!(data[512..].iter().all(|&byte| byte == 0x44));
        }
    }

    #[test]
    fn discarded_clusters_read_as_zero_and_leave_a_clean_image() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = new_qcow2(&dir, 64 * MIB);
        let disk = qcow2(&path);
        let buffer = Buffer::new();
        buffer.write(&*disk, 0, 0x55, 1 << 20);
        disk.write_zeroes(0, 512 << 10, true).expect("unmapped");
        disk.discard(512 << 10, 128 << 10).expect("discarded");
        let data = buffer.read(&*disk, 0, 1 << 20);
        assert!(data[..512 << 10].iter().all(|&byte| byte == 0));
        assert!(data[640 << 10..].iter().all(|&byte| byte == 0x55));
        disk.flush().expect("flushed");
        drop(disk);
        tool("qemu-img", &["check", "-f", "qcow2", text(&path)]);
    }

    #[test]
    fn a_chain_reads_through_and_writes_stay_on_top() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = |name: &str| dir.path().join(name);
        let (base, middle, top) = (path("base.raw"), path("middle"), path("top"));
        create_raw(&File::create_new(&base).expect("a file"), 8 * MIB).expect("made");
        let write = "write -P 0x66 0 2M";
        tool("qemu-io", &["-f", "raw", "-c", write, text(&base)]);
        let create = ["create", "-f", "qcow2", "-F", "raw", "-b"];
        tool(
            "qemu-img",
            &[&create[..], &[text(&base), text(&middle)]].concat(),
        );
        File::create_new(&top).expect("a file");
        let below = Some((text(&middle), Format::Qcow2));
        create_qcow2(file(&top), 8 * MIB, below).expect("made");
        let chain = vec![image(&middle, Format::Qcow2), image(&base, Format::Raw)];
        let disk = open(image(&top, Format::Qcow2), chain, false).expect("opens");
        let buffer = Buffer::new();
        assert_eq!(buffer.read(&*disk, MIB, 512), [0x66; 512]);
        buffer.write(&*disk, MIB, 0x77, 512);
        assert_eq!(buffer.read(&*disk, MIB, 512), [0x77; 512]);
        assert_eq!(buffer.read(&*disk, MIB + 512, 512), [0x66; 512]);
        disk.flush().expect("flushed");
        drop(disk);
        let said = tool(
            "qemu-io",
            &["-f", "qcow2", "-c", "read -P 0x77 1M 512", text(&top)],
        );
        assert!(!said.contains("failed"), "{said}");
        tool("qemu-img", &["check", "-f", "qcow2", text(&top)]);
        let said = tool(
            "qemu-io",
            &["-f", "raw", "-c", "read -P 0x66 1M 512", text(&base)],
        );
        assert!(!said.contains("failed"), "the base is untouched: {said}");
    }

    fn refused(image: Image, backing: Vec<Image>) -> DiskError {
        match open(image, backing, false) {
            Ok(_) => panic!("it was opened"),
            Err(error) => error,
        }
    }

    // The header must not decide what is opened, and a chain must be what its user said.
    #[test]
    fn backing_images_are_the_given_ones_or_none() {
        let dir = tempfile::tempdir().expect("a directory");
        let (base, top) = (dir.path().join("base"), dir.path().join("top"));
        create_raw(&File::create_new(&base).expect("a file"), MIB).expect("made");
        File::create_new(&top).expect("a file");
        create_qcow2(file(&top), MIB, Some((text(&base), Format::Raw))).expect("made");
        let missing = refused(image(&top, Format::Qcow2), Vec::new());
        assert!(missing.to_string().contains("was not given"), "{missing}");
        let other = new_qcow2(&dir, MIB);
        let wrong = vec![image(&other, Format::Qcow2)];
        let wrong = refused(image(&top, Format::Qcow2), wrong);
        assert!(wrong.to_string().contains("\"raw\""), "{wrong}");
        let extra = vec![image(&base, Format::Raw)];
        let extra = refused(image(&other, Format::Qcow2), extra);
        assert!(extra.to_string().contains("has none"), "{extra}");
        let raw = refused(image(&base, Format::Raw), vec![image(&base, Format::Raw)]);
        assert!(matches!(raw, DiskError::Config(_)));
    }

    #[test]
    fn images_that_are_not_what_was_said_are_refused_with_the_reason() {
        let dir = tempfile::tempdir().expect("a directory");
        let raw = dir.path().join("raw");
        create_raw(&File::create_new(&raw).expect("a file"), MIB).expect("made");
        let not_one = refused(image(&raw, Format::Qcow2), Vec::new());
        assert!(matches!(not_one, DiskError::Corrupt { .. }), "{not_one}");
        let whole = new_qcow2(&dir, 64 * MIB);
        for len in [0, 10, 100, 65_536, 100_000] {
            let bytes = std::fs::read(&whole).expect("made");
            let cut = dir.path().join(format!("cut-{len}"));
            std::fs::write(&cut, &bytes[..len]).expect("a file");
            let short = refused(image(&cut, Format::Qcow2), Vec::new());
            assert!(matches!(short, DiskError::Corrupt { .. }), "{len}: {short}");
        }
        let external = dir.path().join("external");
        let data = format!("data_file={}", text(&dir.path().join("data")));
        tool(
            "qemu-img",
            &["create", "-f", "qcow2", "-o", &data, text(&external), "1M"],
        );
        let odd = refused(image(&external, Format::Qcow2), Vec::new());
        assert!(odd.to_string().contains("another file"), "{odd}");
        // AES, since for LUKS qemu-img measures its own processor time first, and gives up where
        // the clock of that is coarse; LUKS is the next number in the same field.
        let encrypted = dir.path().join("encrypted");
        let secret = ["--object", "secret,id=s,data=0123456789abcdef", "-o"];
        let options = [
            "encrypt.format=aes,encrypt.key-secret=s",
            text(&encrypted),
            "1M",
        ];
        tool(
            "qemu-img",
            &[&["create", "-f", "qcow2"][..], &secret, &options].concat(),
        );
        const METHOD: u64 = 32;
        for method in [1_u32, 2] {
            file(&encrypted)
                .write_all_at(&method.to_be_bytes(), METHOD)
                .expect("written");
            let odd = refused(image(&encrypted, Format::Qcow2), Vec::new());
            assert!(odd.to_string().contains("encrypted"), "{odd}");
        }
    }

    #[test]
    fn requests_past_the_end_and_writes_to_read_only_disks_are_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = new_qcow2(&dir, MIB);
        let raw = dir.path().join("raw");
        std::fs::write(&raw, vec![7; 1000]).expect("a file");
        let buffer = Buffer::new();
        for (path, format, size) in [(&path, Format::Qcow2, MIB), (&raw, Format::Raw, 1024)] {
            let disk = open(image(path, format), Vec::new(), true).expect("opens");
            let slice = || {
                [buffer
                    .0
                    .memory()
                    .get_slice(GuestAddress(0), 512)
                    .expect("ram")]
            };
            for offset in [size, size - 511, u64::MAX - 100] {
                let error = disk.read(&slice(), offset).expect_err("past the end");
                assert!(matches!(error, DiskError::Range { .. }), "{offset}");
            }
            let error = disk.write(&slice(), 0).expect_err("read only");
            assert!(matches!(error, DiskError::ReadOnly));
            disk.discard(0, 512).expect_err("read only");
            disk.write_zeroes(0, 512, true).expect_err("read only");
        }
        let disk = open(image(&raw, Format::Raw), Vec::new(), true).expect("opens");
        let last = buffer.read(&*disk, 512, 512);
        assert_eq!(
            (last[487], last[488]),
            (7, 0),
            "zeros behind the file's end"
        );
    }
}
