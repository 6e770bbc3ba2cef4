//! Checking an ext4 before it is mounted (e2fsck(8)). XFS and btrfs are made whole by the kernel when it mounts them, and their tools
//! repair nothing unasked.

use std::sync::Arc;

use super::{
    device::Device,
    exec::{THE_DISK, Tool, Tools},
};
use crate::host::error::CheckError;

/// Bits of e2fsck's exit status: errors were corrected, and the machine should be started anew if it was its root.
const CORRECTED: i32 = 1 | 2;
/// Errors were left: they need a person's answers.
const UNCORRECTED: i32 = 4;

/// `-p`: what can be corrected without a doubt is corrected, and a journal replayed; nothing is asked. A clean file system takes a
/// few milliseconds. It opens the disk exclusively, so that what is mounted anywhere is not touched.
pub(super) async fn ext4(tools: &Tools, name: &str, device: &Arc<Device>) -> Result<(), CheckError> {
    // No deadline: a repair that is cut off leaves more to repair.
    let tool = Tool::new("e2fsck", ["-p", THE_DISK]).on(Arc::clone(device));
    let fail = |source| CheckError::Tool { name: name.to_owned(), source };
    let output = tools.run(tool).await.map_err(fail)?;
    match output.code {
        Some(0) => Ok(()),
        Some(code) if code & !CORRECTED == 0 => {
            tracing::warn!(
                disk = name,
                said = output.stdout.trim(),
                "an ext4 was repaired before it is mounted"
            );
            Ok(())
        }
        Some(code) if code & UNCORRECTED != 0 => {
            Err(CheckError::Damaged { name: name.to_owned(), source: output.failure_in_stdout() })
        }
        _ => Err(fail(output.failure())),
    }
}
