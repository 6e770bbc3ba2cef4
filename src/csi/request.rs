//! What the handlers of both services do with a request: read its fields, and run its work in a task of its own.

use std::future::Future;

use prost::Message;
use sha2::{Digest as _, Sha256};
use tonic::{Response, Status};
use tracing::Instrument as _;

use super::proto;
use crate::{
    runtime::{NoOutcome, Operations},
    types::{Bytes, VolumeHandle},
};

/// Runs work on an object in a task of its own, which goes on when the caller hangs up.
///
/// `volume` is what the call's span shows; `object` is what operations exclude each other by.
pub(super) async fn run<R, T, E, F>(
    operations: &Operations,
    what: &'static str,
    (volume, object): (&str, &str),
    request: &R,
    work: F,
) -> Result<Response<T>, Status>
where
    R: Message,
    T: Clone + Send + Sync + 'static,
    E: Into<Status>,
    F: Future<Output = Result<T, E>> + Send + 'static,
{
    tracing::Span::current().record("volume", volume);
    let work = async move { work.await.map_err(Into::into) }.in_current_span();
    // A hash, so that no secret of a request stays in memory for the sake of comparing.
    let fingerprint = Sha256::digest(request.encode_to_vec()).to_vec();
    let outcome: Result<T, Status> =
        operations.run(what, object, fingerprint, work).await.map_err(|error| no_outcome(&error))?;
    outcome.map(Response::new)
}

/// The key under which operations on a volume exclude each other. The zone is left out: both handle forms of a shared volume must give one key.
pub(super) fn object(handle: &VolumeHandle) -> String {
    format!("{}/{}", handle.region, handle.volid)
}

/// Another operation on the object runs, or the work was lost: in both cases asking again is right.
fn no_outcome(error: &NoOutcome) -> Status {
    match error {
        NoOutcome::Busy { .. } => Status::aborted(error.to_string()),
        NoOutcome::Lost { .. } => Status::unavailable(error.to_string()),
    }
}

/// Refuses a field that is missing.
pub(super) fn required(field: &str, value: &str) -> Result<(), Status> {
    if value.is_empty() { Err(Status::invalid_argument(format!("`{field}` is missing"))) } else { Ok(()) }
}

/// Reads a capacity range: what is asked for at least, and what is allowed at most.
pub(super) fn range(range: Option<&proto::CapacityRange>) -> Result<(Option<Bytes>, Option<Bytes>), Status> {
    let Some(range) = range else { return Ok((None, None)) };
    let read = |field: &str, value: i64| match u64::try_from(value) {
        Ok(0) => Ok(None),
        Ok(bytes) => Ok(Some(Bytes::new(bytes))),
        Err(_) => Err(Status::invalid_argument(format!("`{field}` is negative"))),
    };
    let required = read("required_bytes", range.required_bytes)?;
    let limit = read("limit_bytes", range.limit_bytes)?;
    match (required, limit) {
        (Some(required), Some(limit)) if required > limit => {
            Err(Status::out_of_range(format!("at least {required} and at most {limit} is asked for")))
        }
        both => Ok(both),
    }
}

/// A size as CSI writes it.
pub(super) fn signed(bytes: Bytes) -> i64 {
    i64::try_from(bytes.get()).unwrap_or(i64::MAX)
}
