//! Whether a volume is what a request takes it for.

use crate::{
    csi::proto,
    types::params::{ImageFormat, Parameters},
    volume::{create::CreateError, delete::FoundVolume},
};

/// Why a volume is none that a request for a new one would make of these parameters, or that has this context.
///
/// A context says little of a PV that was made by hand: only what stands in it must hold.
pub(super) fn matches(
    found: &FoundVolume,
    request: &proto::ValidateVolumeCapabilitiesRequest,
) -> Result<(), String> {
    let (asked, _) = Parameters::of_new_volume(&request.parameters).map_err(|error| error.to_string())?;
    let (context, _) = Parameters::of_existing_volume(&request.volume_context);
    if asked.replicate {
        return Err(CreateError::Replicated.to_string());
    }
    let volid = &found.place.volid;
    let ending = volid.name.as_str().rsplit('.').next().and_then(|ending| ending.parse().ok());
    let format = ending.unwrap_or(ImageFormat::Raw);
    let says_format = !request.parameters.is_empty();
    let context_says_format = request.volume_context.contains_key("storageFormat");
    for (what, said, says_format) in
        [("parameters", &asked, says_format), ("context", &context, context_says_format)]
    {
        if let Some(storage) = said.storage.as_ref().filter(|storage| **storage != volid.storage) {
            let has = &volid.storage;
            return Err(format!("the {what} name storage `{storage}`, and the volume is on `{has}`"));
        }
        if says_format && said.format != format {
            return Err(format!(
                "the {what} stand for a {} image, and the volume is a {format} one",
                said.format
            ));
        }
    }
    Ok(())
}
