//! Compiles `proto/csi.proto` with protox, so that no protoc is needed.

use std::{env, error::Error, fs, path::PathBuf};

/// Messages that carry secrets: they get a `Debug` written by hand that shows none (see `csi::proto`).
const WITH_SECRETS: &[&str] = &[
    "CreateVolumeRequest",
    "DeleteVolumeRequest",
    "ControllerPublishVolumeRequest",
    "ControllerUnpublishVolumeRequest",
    "ValidateVolumeCapabilitiesRequest",
    "CreateSnapshotRequest",
    "DeleteSnapshotRequest",
    "ListSnapshotsRequest",
    "GetSnapshotRequest",
    "ControllerExpandVolumeRequest",
    "ControllerModifyVolumeRequest",
    "NodeStageVolumeRequest",
    "NodePublishVolumeRequest",
    "NodeExpandVolumeRequest",
    "CreateVolumeGroupSnapshotRequest",
    "DeleteVolumeGroupSnapshotRequest",
    "GetVolumeGroupSnapshotRequest",
    "GetMetadataAllocatedRequest",
    "GetMetadataDeltaRequest",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto/csi.proto");
    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler.include_source_info(true).include_imports(true).open_file("proto/csi.proto")?;
    // Encoded by the compiler: the types of prost drop the options of csi.proto, which the wire test reads.
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("csi.descriptor.bin"), compiler.encode_file_descriptor_set())?;
    let descriptors = compiler.file_descriptor_set();

    let mut config = prost_build::Config::new();
    // Ordered maps: equal requests encode to equal bytes, and output is stable.
    config.btree_map(["."]);
    config.skip_debug(WITH_SECRETS.iter().map(|name| format!(".csi.v1.{name}")));
    tonic_prost_build::configure().compile_fds_with_config(descriptors, config)?;
    Ok(())
}
