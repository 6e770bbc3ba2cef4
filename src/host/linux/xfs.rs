//! Which features of XFS the running kernel can mount.
//!
//! mkfs.xfs of a container may be newer than the node's kernel, and makes by default what that refuses to mount: for ever, since a
//! volume is formatted once. xfsprogs are released with the kernel of the same number, so that a kernel which is not older mounts all
//! that they make. On an older one an XFS is made in a file, mounted, and thrown away, before the first is made on a disk. Where it
//! does not mount, features are left out, the newest first, until one does.

use std::{io, path::Path, sync::Arc, time::Duration};

use tokio::sync::OnceCell;

use super::{
    exec::{Output, Tool, Tools},
    loopdev::LoopDevice,
};
use crate::host::error::ToolError;

/// What is left out, each list added to those before it: at first nothing. The kernels that know the features, from the history of
/// `fs/xfs/libxfs/xfs_format.h`: 6.10; 5.19; 5.10; 4.9.
const NEWEST_FIRST: [&[&str]; 5] = [
    &[],
    &["-i", "exchange=0", "-n", "parent=0"],
    &["-i", "nrext64=0"],
    &["-m", "bigtime=0,inobtcount=0"],
    &["-m", "reflink=0,rmapbt=0"],
];
/// mkfs.xfs makes none that is smaller than 300 MB. Written is its log, 64 MiB.
const SIZE: u64 = 512 << 20;
const DEADLINE: Duration = Duration::from_mins(1);

/// The answer, once it is known.
#[derive(Debug, Clone, Default)]
pub(super) struct XfsFeatures(Arc<OnceCell<Vec<&'static str>>>);

impl XfsFeatures {
    /// Arguments of mkfs.xfs that leave out what this kernel can't mount. Where that can't be found out, none: then mkfs decides, as it
    /// would anyway.
    pub(super) async fn to_leave_out(&self, tools: &Tools) -> &[&'static str] {
        let found = self.0.get_or_try_init(|| async {
            let found = find_out(tools).await;
            if let Err(error) = &found {
                let error: &dyn std::error::Error = error;
                tracing::warn!(error, "which XFS features this kernel can mount is not known");
            }
            found
        });
        found.await.map_or(&[], Vec::as_slice)
    }
}

/// Why it is not known.
#[derive(Debug, thiserror::Error)]
enum Unknown {
    #[error("cannot make an XFS to try")]
    Mkfs(#[from] ToolError),
    #[error("cannot mount an XFS to try")]
    Mount(#[from] io::Error),
    #[error("the kernel mounts no XFS at all; is its module there?")]
    None,
}

async fn find_out(tools: &Tools) -> Result<Vec<&'static str>, Unknown> {
    let said = tools.run(Tool::new("mkfs.xfs", ["-V"]).within(DEADLINE)).await?.success()?;
    let kernel = tokio::fs::read_to_string("/proc/sys/kernel/osrelease").await?;
    let made_for = release(said.stdout.trim_start_matches("mkfs.xfs version "));
    if made_for.is_some() && made_for <= release(&kernel) {
        return Ok(Vec::new());
    }
    let directory = tempfile::tempdir()?;
    let (image, target) = (directory.path().join("image"), directory.path().join("mount"));
    std::fs::create_dir(&target)?;
    let mut left_out: Vec<&'static str> = Vec::new();
    for more in NEWEST_FIRST {
        // A mkfs that does not know a feature does not make it either.
        let mut tried = left_out.clone();
        tried.extend(more);
        match make(tools, &image, &tried).await {
            Ok(()) => left_out = tried,
            Err(ToolError::Failed { .. }) if !more.is_empty() => continue,
            Err(error) => return Err(error.into()),
        }
        if mounts(tools, &image, &target).await? {
            if !left_out.is_empty() {
                tracing::info!(?left_out, "this kernel can not mount every feature of mkfs.xfs");
            }
            return Ok(left_out);
        }
    }
    Err(Unknown::None)
}

/// The first two numbers of a release.
fn release(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.trim().split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

async fn make(tools: &Tools, image: &Path, left_out: &[&'static str]) -> Result<(), ToolError> {
    let failed = |source| ToolError::Run { tool: "mkfs.xfs", source };
    let file = std::fs::File::create(image).map_err(failed)?;
    file.set_len(SIZE).map_err(failed)?;
    let mut args: Vec<String> = ["-q", "-K"].iter().chain(left_out).map(|arg| (*arg).to_owned()).collect();
    args.push(image.display().to_string());
    tools.run(Tool::new("mkfs.xfs", args).within(DEADLINE)).await.and_then(Output::success).map(drop)
}

/// Whether the kernel mounts it, writable: it mounts read-only what it could not write.
async fn mounts(tools: &Tools, image: &Path, target: &Path) -> io::Result<bool> {
    let (image, target) = (image.to_owned(), target.to_owned());
    let place = target.clone();
    let work = move || {
        let device = LoopDevice::attach(&image, false)?;
        let builder = sys_mount::Mount::builder().fstype("xfs");
        match builder.mount(device.path(), &target) {
            Ok(_) => super::mount::take_off(&target).map(|()| true),
            // EINVAL: features that it does not know. ENODEV would be no XFS at all.
            Err(error) if error.raw_os_error() == Some(nix::libc::EINVAL) => Ok(false),
            Err(error) => Err(error),
        }
    };
    tools.calls.blocking("mount at", &place, DEADLINE, work).await?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_compared_by_their_numbers() {
        assert!(release("6.1.0") < release("6.12.111-cloud-amd64\n"));
        assert!(release("6.18-rc1") < release("7.0.0"));
        assert_eq!(release("unknown"), None);
    }
}
