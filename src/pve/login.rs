//! Requests with what Proxmox wants to see of who sends them, and logins.

use http::Method;
use serde::Deserialize;
use serde_json::Value;

use super::{
    ApiError,
    auth::{Login, NoPass, Pass, Ticket},
    client::{Call, Client},
    limits::Class,
    wire,
};

#[derive(Deserialize)]
struct RawTicket {
    #[serde(default)]
    ticket: Option<String>,
    #[serde(default, rename = "CSRFPreventionToken")]
    csrf: Option<String>,
    #[serde(default, rename = "NeedTFA")]
    second_factor: Value,
}

impl Client {
    /// What the next request carries; logs in where that takes a ticket and there is none.
    pub(super) async fn pass(&self, call: &Call) -> Result<Pass, ApiError> {
        loop {
            let login = match self.auth.pass().await {
                Ok(pass) => return Ok(pass),
                Err(NoPass::Refused(words)) => return Err(ApiError::unauthenticated(call.request(), words)),
                Err(NoPass::Login(login)) => login,
            };
            match self.login(&login).await {
                Ok(pass) => return Ok(pass),
                Err(error) if error.is_unauthenticated() => {
                    if !self.auth.login_refused(&error.words()).await {
                        return Err(error);
                    }
                }
                Err(error) => {
                    self.auth.login_failed().await;
                    return login.fallback.ok_or(error);
                }
            }
        }
    }

    /// Logs in. The password is in the body and nowhere else.
    /// Source: pve-access-control `API2/AccessControl.pm`, `create_ticket`.
    async fn login(&self, login: &Login) -> Result<Pass, ApiError> {
        let call = Call::new("login", Method::POST, &[&"access", &"ticket"])
            .with("username", login.username.expose())
            .with("password", login.password.expose())
            .class(Class::Login);
        let raw: RawTicket = self.exchange(&call, None).await?;
        if wire::read_flag(&raw.second_factor) {
            let words = "the user has a second factor; hint: make an API token, and set `token_id` and `token_secret`";
            return Err(ApiError::unauthenticated(call.request(), words.to_owned()));
        }
        let unreadable = || ApiError::unreadable("a login", "it gave no ticket");
        let (ticket, csrf) = raw.ticket.zip(raw.csrf).ok_or_else(unreadable)?;
        self.auth.logged_in(&Ticket { ticket, csrf }).await.ok_or_else(unreadable)
    }
}
