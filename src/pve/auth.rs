//! Who the driver is: an API token, or a ticket for a name and password. [`Auth::pass`] gives what a request must carry.
//!
//! What stands in files is read again when it changes, and at once when Proxmox refuses what is known. Proxmox takes 3 s to refuse, so what
//! was refused is not sent again before a pause, and then by one request alone. A ticket is good for two hours and renewed after one
//! (pve-access-control `AccessControl.pm:verify_ticket`, `API2/AccessControl.pm:create_ticket`).

use std::{path::Path, sync::Arc, time::Duration};

use http::{HeaderName, HeaderValue, header};
use percent_encoding::utf8_percent_encode;
use tokio::{sync::Mutex, time::Instant};

use super::client::PLAIN;
use crate::{
    telemetry::pve::PveMetrics,
    types::{
        Credentials, Region,
        credentials::{Secret, Source},
    },
};

/// How often files are looked at.
const RECHECK: Duration = Duration::from_secs(10);
/// The pause after a refusal, and the longest one.
const PAUSE: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(20));
/// The age at which a ticket is renewed, and the one from which it is no longer used.
const RENEW: Duration = Duration::from_hours(1);
const EXPIRED: Duration = Duration::from_mins(115);
/// A ticket that is refused before this age is not worth another login at once.
const FRESH: Duration = Duration::from_mins(1);
/// How long a renewal that gave no answer is not tried again, while the old ticket is good.
const RENEW_PAUSE: Duration = Duration::from_mins(1);

/// Credentials that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// They can't be a header.
    #[error("the token of region `{region}` has characters that no Proxmox token has")]
    Characters {
        /// The region.
        region: Region,
    },
    /// A file of theirs can't be read, or is empty.
    #[error("cannot read the credentials of region `{region}` from `{path}`: {why}")]
    File {
        /// The region.
        region: Region,
        /// The file.
        path: String,
        /// Why.
        why: String,
    },
}

/// What a request carries.
#[derive(Clone)]
pub(super) struct Pass {
    generation: u64,
    pub(super) headers: Vec<(HeaderName, HeaderValue)>,
    /// For requests that change something.
    pub(super) csrf: Option<HeaderValue>,
}

/// Why there is no pass.
pub(super) enum NoPass {
    /// Proxmox refused these credentials a moment ago, in these words.
    Refused(String),
    /// A login is needed; it may only be done by who holds this.
    Login(Login),
}

/// A login that is to be done: name and password, and the right to do it.
pub(super) struct Login {
    pub(super) username: Secret,
    pub(super) password: Secret,
    /// A pass that is still good should the login give no answer.
    pub(super) fallback: Option<Pass>,
    _turn: tokio::sync::OwnedMutexGuard<()>,
}

/// A ticket, as Proxmox gives it.
pub(super) struct Ticket {
    pub(super) ticket: String,
    pub(super) csrf: String,
}

/// The credentials of a region. Clones share them.
#[derive(Clone)]
pub(super) struct Auth {
    region: Region,
    credentials: Arc<Credentials>,
    metrics: PveMetrics,
    state: Arc<Mutex<State>>,
    login: Arc<Mutex<()>>,
}

struct State {
    /// Name (or token id) and secret, as last read.
    known: (Secret, Secret),
    read: Instant,
    /// Counts credentials and tickets, so that it is known which one was refused.
    generation: u64,
    ticket: Option<(Pass, Instant)>,
    renew_after: Option<Instant>,
    refused: Option<Refused>,
}

struct Refused {
    words: String,
    until: Instant,
    pause: Duration,
    /// Whether a request was let through after the pause.
    tried: bool,
}

impl Refused {
    /// Lets one request through; others go on waiting.
    fn try_once(&mut self, now: Instant) {
        self.until = now + self.pause;
        self.tried = true;
    }
}

impl Auth {
    /// Reads what stands in files.
    pub(super) fn new(
        region: Region,
        credentials: Credentials,
        metrics: PveMetrics,
    ) -> Result<Self, AuthError> {
        let read = |source: &Source| match source {
            Source::Inline(secret) => Ok(secret.clone()),
            Source::File(path) => {
                let text = std::fs::read_to_string(path);
                secret_of(path, text).map_err(|(path, why)| AuthError::File {
                    region: region.clone(),
                    path,
                    why,
                })
            }
        };
        let (name, secret) = sources(&credentials);
        let known = (read(name)?, read(secret)?);
        if !is_sendable(&credentials, &known) {
            return Err(AuthError::Characters { region });
        }
        let state = State {
            known,
            read: Instant::now(),
            generation: 0,
            ticket: None,
            renew_after: None,
            refused: None,
        };
        Ok(Self {
            region,
            credentials: Arc::new(credentials),
            metrics,
            state: Arc::new(Mutex::new(state)),
            login: Arc::default(),
        })
    }

    /// Token id or user name.
    pub(super) async fn who(&self) -> String {
        self.state.lock().await.known.0.expose().to_owned()
    }

    /// What the next request carries, or what has to be done to get it.
    pub(super) async fn pass(&self) -> Result<Pass, NoPass> {
        if let Some(ready) = self.ready(None).await {
            return ready;
        }
        let turn = Arc::clone(&self.login).lock_owned().await;
        // Somebody else may have logged in while we waited.
        self.ready(Some(turn)).await.unwrap_or_else(|| Err(NoPass::Refused("no ticket".to_owned())))
    }

    /// A pass, a refusal, or the right to log in; `None` where that right has to be waited for.
    async fn ready(&self, turn: Option<tokio::sync::OwnedMutexGuard<()>>) -> Option<Result<Pass, NoPass>> {
        let mut state = self.state.lock().await;
        let now = Instant::now();
        if state.refused.is_some() || now.duration_since(state.read) >= RECHECK {
            self.reread(&mut state).await;
        }
        if let Some(refused) = &state.refused
            && now < refused.until
        {
            let wait = (refused.until - now).as_secs() + 1;
            let words = format!("{} (not asked again before {wait} s have passed)", refused.words);
            return Some(Err(NoPass::Refused(words)));
        }
        if let Credentials::Token { .. } = &*self.credentials {
            if let Some(refused) = &mut state.refused {
                refused.try_once(now);
            }
            let Some(value) = token_header(&state.known) else {
                return Some(Err(NoPass::Refused("the token has characters that no token has".to_owned())));
            };
            let headers = vec![(header::AUTHORIZATION, value)];
            return Some(Ok(Pass { generation: state.generation, headers, csrf: None }));
        }
        let good = state.ticket.as_ref().filter(|(_, since)| now.duration_since(*since) < EXPIRED);
        if let Some((pass, since)) = good {
            let due =
                now.duration_since(*since) >= RENEW && state.renew_after.is_none_or(|after| now >= after);
            if !due {
                return Some(Ok(pass.clone()));
            }
        }
        let fallback = good.map(|(pass, _)| pass.clone());
        let turn = match (turn, &fallback) {
            (Some(turn), _) => turn,
            // Somebody else renews it.
            (None, Some(pass)) => match Arc::clone(&self.login).try_lock_owned() {
                Ok(turn) => turn,
                Err(_) => return Some(Ok(pass.clone())),
            },
            (None, None) => return None,
        };
        if let Some(refused) = &mut state.refused {
            refused.try_once(now);
        }
        let (username, password) = state.known.clone();
        Some(Err(NoPass::Login(Login { username, password, fallback, _turn: turn })))
    }

    /// A login gave this ticket.
    pub(super) async fn logged_in(&self, ticket: &Ticket) -> Option<Pass> {
        let mut state = self.state.lock().await;
        // Proxmox's own clients encode it as well: a ticket has `:`, `@` and `=` in it.
        let cookie = format!("PVEAuthCookie={}", utf8_percent_encode(&ticket.ticket, PLAIN));
        let sensitive = |text: &str| {
            let mut value = HeaderValue::try_from(text).ok()?;
            value.set_sensitive(true);
            Some(value)
        };
        state.generation += 1;
        let pass = Pass {
            generation: state.generation,
            headers: vec![(header::COOKIE, sensitive(&cookie)?)],
            csrf: Some(sensitive(&ticket.csrf)?),
        };
        state.ticket = Some((pass.clone(), Instant::now()));
        state.renew_after = None;
        state.refused = None;
        self.metrics.login(self.region.as_str(), "ok");
        Some(pass)
    }

    /// A login gave no answer: it is tried again when the next request needs it, or after a while where the old ticket is good.
    pub(super) async fn login_failed(&self) {
        self.state.lock().await.renew_after = Some(Instant::now() + RENEW_PAUSE);
        self.metrics.login(self.region.as_str(), "unknown");
    }

    /// A login was refused. Tells whether the password is another one by now, so that it is worth another try.
    pub(super) async fn login_refused(&self, words: &str) -> bool {
        self.metrics.login(self.region.as_str(), "refused");
        let mut state = self.state.lock().await;
        state.ticket = None;
        if self.reread(&mut state).await {
            return true;
        }
        refuse(&mut state, words);
        false
    }

    /// A request with this pass was refused as unauthenticated. Tells whether there is another one by now, or may be after a login, so that
    /// it is worth another try.
    pub(super) async fn refused(&self, pass: &Pass, words: &str) -> bool {
        let mut state = self.state.lock().await;
        if pass.generation != state.generation || self.reread(&mut state).await {
            return true;
        }
        if let Some((_, since)) = state.ticket.take()
            && since.elapsed() >= FRESH
        {
            return true;
        }
        refuse(&mut state, words);
        false
    }

    /// A request with this pass was let in.
    pub(super) async fn accepted(&self, pass: &Pass) {
        let mut state = self.state.lock().await;
        if state.refused.is_some() && pass.generation == state.generation {
            tracing::info!(region = %self.region, "the credentials are accepted again");
            state.refused = None;
        }
    }

    /// Reads the files again; tells whether they say something else than before.
    async fn reread(&self, state: &mut State) -> bool {
        state.read = Instant::now();
        let (name, secret) = sources(&self.credentials);
        let mut now = state.known.clone();
        for (source, known) in [(name, &mut now.0), (secret, &mut now.1)] {
            let Source::File(path) = source else { continue };
            match secret_of(path, tokio::fs::read_to_string(path).await) {
                Ok(text) => *known = text,
                // What is known goes on being used: the file may be just about to be replaced.
                Err((file, why)) => {
                    tracing::warn!(region = %self.region, file, error = why, "cannot read the credentials again");
                }
            }
        }
        if now == state.known {
            return false;
        }
        if !is_sendable(&self.credentials, &now) {
            tracing::warn!(region = %self.region, "the changed credentials have characters that no token has");
            return false;
        }
        tracing::info!(region = %self.region, "the credentials have changed and were read again");
        self.metrics.reload(self.region.as_str());
        state.known = now;
        state.generation += 1;
        state.ticket = None;
        state.refused = None;
        true
    }
}

fn refuse(state: &mut State, words: &str) {
    let pause = match &state.refused {
        Some(refused) if refused.tried => (refused.pause * 2).min(PAUSE.1),
        // Requests that were under way together are refused together.
        Some(refused) => refused.pause,
        None => PAUSE.0,
    };
    let until = Instant::now() + pause;
    state.refused = Some(Refused { words: words.to_owned(), until, pause, tried: false });
}

fn sources(credentials: &Credentials) -> (&Source, &Source) {
    match credentials {
        Credentials::Token { id, secret } => (id, secret),
        Credentials::Login { username, password } => (username, password),
    }
}

fn secret_of(path: &Path, text: std::io::Result<String>) -> Result<Secret, (String, String)> {
    let path = path.display().to_string();
    match text {
        Ok(text) if text.trim().is_empty() => Err((path, "it is empty".to_owned())),
        Ok(text) => Ok(Secret::new(text.trim())),
        Err(error) => Err((path, error.to_string())),
    }
}

/// Whether a header can carry them; a password travels in a body, which can carry anything.
fn is_sendable(credentials: &Credentials, known: &(Secret, Secret)) -> bool {
    matches!(credentials, Credentials::Login { .. }) || token_header(known).is_some()
}

/// The header of a token; `None` where it can't be one.
fn token_header((id, secret): &(Secret, Secret)) -> Option<HeaderValue> {
    let mut value = HeaderValue::try_from(format!("PVEAPIToken={}={}", id.expose(), secret.expose())).ok()?;
    value.set_sensitive(true);
    Some(value)
}
