//! What a disk of PVE 9 says of itself: the bytes a Linux guest keeps under `device/` (measured on kernels 6.1 and
//! 6.12 with QEMU's `scsi-hd`, `device_id=drive-scsiN`).

/// Standard INQUIRY data.
pub(super) const INQUIRY: &[u8] = b"\x00\x00\x05\x12\x1f\x00\x00\x12QEMU    QEMU HARDDISK   2.5+";

/// QEMU cuts serial numbers to this.
const LONGEST_SERIAL: usize = 36;

fn page(code: u8, body: &[u8]) -> Vec<u8> {
    let length = u16::try_from(body.len()).unwrap_or(u16::MAX);
    let mut page = vec![0, code];
    page.extend(length.to_be_bytes());
    page.extend(body);
    page
}

/// Page 0x83: the device id in ASCII, and with a WWN its eight bytes as an NAA designator.
pub(super) fn vpd_pg83(slot: u32, wwn: Option<u64>) -> Vec<u8> {
    let name = format!("drive-scsi{slot}");
    let mut body = vec![0x02, 0x00, 0x00, u8::try_from(name.len()).unwrap_or(u8::MAX)];
    body.extend(name.as_bytes());
    if let Some(wwn) = wwn {
        body.extend([0x01, 0x03, 0x00, 0x08]);
        body.extend(wwn.to_be_bytes());
    }
    page(0x83, &body)
}

/// Page 0x80, which a disk without a serial number does not have.
pub(super) fn vpd_pg80(serial: Option<&str>) -> Option<Vec<u8>> {
    serial.map(|serial| page(0x80, serial.as_bytes().get(..LONGEST_SERIAL).unwrap_or(serial.as_bytes())))
}

/// Page 0x00: the pages there are.
pub(super) fn vpd_pg0(serial: Option<&str>) -> Vec<u8> {
    let pages: &[u8] = if serial.is_some() {
        &[0x00, 0x80, 0x83, 0xb0, 0xb1, 0xb2]
    } else {
        &[0x00, 0x83, 0xb0, 0xb1, 0xb2]
    };
    page(0x00, pages)
}

/// Page 0xb1: a rotation rate of 1 says that nothing rotates.
pub(super) fn vpd_pgb1(ssd: bool) -> Vec<u8> {
    let mut body = [0; 0x3c];
    body[1] = u8::from(ssd);
    page(0xb1, &body)
}

/// The line of `wwid`; `None` where the kernel answers EINVAL, which it does for every NAA nibble but 3 to 6.
pub(super) fn wwid(wwn: Option<u64>) -> Option<String> {
    let wwn = wwn?;
    (3..=6).contains(&(wwn >> 60)).then(|| format!("naa.{wwn:016x}\n"))
}

/// Names under `/dev/disk/by-id`, as udev makes them.
pub(super) fn by_id(slot: u32, wwn: Option<u64>) -> Vec<String> {
    match wwn {
        Some(wwn) => vec![format!("wwn-0x{wwn:016x}"), format!("scsi-3{wwn:016x}")],
        None => vec![format!("scsi-0QEMU_QEMU_HARDDISK_drive-scsi{slot}")],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pages_are_the_measured_ones() {
        assert_eq!(
            vpd_pg83(1, Some(0x3c51_aabb_ccdd_eeff)),
            b"\x00\x83\x00\x1b\x02\x00\x00\x0bdrive-scsi1\x01\x03\x00\x08\x3c\x51\xaa\xbb\xcc\xdd\xee\xff"
        );
        assert_eq!(vpd_pg83(4, None), b"\x00\x83\x00\x0f\x02\x00\x00\x0bdrive-scsi4");
        assert_eq!(vpd_pg80(Some("pvc-abcdef")).as_deref(), Some(&b"\x00\x80\x00\x0apvc-abcdef"[..]));
        assert_eq!(vpd_pg0(None), b"\x00\x00\x00\x05\x00\x83\xb0\xb1\xb2");
        assert_eq!(vpd_pgb1(true).len(), 0x40);
        assert_eq!(INQUIRY.len(), 0x24);
    }

    #[test]
    fn only_four_nibbles_make_a_wwid() {
        assert_eq!(wwid(Some(0x3c51_aabb_ccdd_eeff)).as_deref(), Some("naa.3c51aabbccddeeff\n"));
        assert_eq!(wwid(Some(0xc51a_abbc_cdde_eff0)), None);
        assert_eq!(wwid(None), None);
    }
}
