//! Checks who a client is, by SCRAM, by a password in clear text or by a token, without waking anything.

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use bytes::Bytes;
use control_plane_api::internal::RoleAuth;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::Semaphore,
};
use types::EndpointId;

use crate::{
    end::{EndReason, Stop},
    endpoint_name::{EndpointName, split_password},
    handshake::{self, HandshakeError, PASSWORD_MAX_BYTES, SASL_MAX_BYTES},
    key_sets::{KeySets, VerifyError},
    login_limit::LoginLimit,
    messages::{self, FatalError},
    remembered_passwords::RememberedPasswords,
    roles::{Found, Role, Roles},
    scram::{Binding, Exchange, SCRAM_SHA_256, SCRAM_SHA_256_PLUS, ScramError, Verifier},
    server::ClientStream,
    token::{Claims, Token, TokenError},
};

/// Bytes of randomness in a nonce, as in Postgres.
const NONCE_BYTES: usize = 18;

/// Checks logins.
pub struct Login {
    roles: Roles,
    key_sets: KeySets,
    /// How long a role's verifier is used without asking the control plane again.
    fresh_for: Duration,
    limit: LoginLimit,
    begun: Instant,
    remembered: RememberedPasswords,
    /// Hashing a password takes milliseconds: no more of that at a time than leaves the proxy working.
    hashing: Semaphore,
    /// Makes the salts of roles that don't exist; new with every process.
    mock_secret: [u8; 32],
}

/// Asks for a password in clear text. The caller has made sure that clear text is all right here.
pub async fn ask_password(stream: &mut ClientStream) -> Result<Bytes, Stop> {
    send(stream, &messages::ask_cleartext_password()).await?;
    let body = read_answer(stream, PASSWORD_MAX_BYTES).await?;
    Ok(body.slice_ref(handshake::parse_password(&body)?))
}

/// The endpoint that a password names, and the rest of it. `missing` is the error for one that names none.
pub fn endpoint_in_password(password: &[u8], missing: impl FnOnce() -> Stop) -> Result<(EndpointName, &[u8]), Stop> {
    Ok(split_password(password).ok_or_else(missing)??)
}

/// A role to check, and what to check it against.
struct Candidate {
    endpoint: EndpointId,
    verifier: Verifier,
    /// What the control plane says; `None` when the verifier is made up.
    auth: Option<Arc<RoleAuth>>,
    /// False when the verifier is remembered and may be out of date.
    fresh: bool,
    /// When the control plane was asked.
    asked: Instant,
}

/// A good login.
pub struct Admitted {
    /// What the control plane says of the role and its endpoint.
    pub auth: Arc<RoleAuth>,
    /// When it was asked.
    pub asked: Instant,
}

/// What the control plane says of a role.
struct LookedUp {
    /// `None`: there is no such role.
    auth: Option<Arc<RoleAuth>>,
    fresh: bool,
    asked: Instant,
}

impl Login {
    /// Looks roles up in `roles`, and keys of tokens in `key_sets`. `fresh_for`: how long what is known of a role is used
    /// without asking again.
    pub fn new(roles: Roles, key_sets: KeySets, fresh_for: Duration) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self {
            roles,
            key_sets,
            fresh_for,
            limit: LoginLimit::default(),
            begun: Instant::now(),
            remembered: RememberedPasswords::default(),
            hashing: Semaphore::new(cores),
            mock_secret: rand::random(),
        }
    }

    /// Logs a client in whose endpoint is known. `end_point`: data for channel binding, inside TLS.
    pub async fn by_scram(
        &self,
        stream: &mut ClientStream,
        end_point: Option<&Arc<[u8]>>,
        from: IpAddr,
        endpoint: &EndpointId,
        user: &str,
    ) -> Result<(), Stop> {
        self.check_limit(from, endpoint)?;
        let candidate = self.candidate(endpoint, user, self.fresh_for).await?;
        match exchange(stream, end_point, &candidate.verifier).await {
            Ok(()) => self.admit(from, candidate, user).await.map(|_| ()),
            Err(LoginError::Scram(ScramError::WrongPassword)) => {
                self.roles.doubt(endpoint, user);
                self.limit.failed(self.begun.elapsed(), from, endpoint);
                Err(wrong_password(user))
            }
            Err(LoginError::Scram(error)) => Err(scram_refusal(error)),
            Err(LoginError::Stop(stop)) => Err(stop),
        }
    }

    /// Checks a password in clear text.
    pub async fn by_password(
        &self,
        from: IpAddr,
        endpoint: &EndpointId,
        user: &str,
        password: &[u8],
    ) -> Result<(), Stop> {
        self.by_password_within(self.fresh_for, from, endpoint, user, password).await.map(|_| ())
    }

    /// The same, with another `fresh_for`.
    pub async fn by_password_within(
        &self,
        fresh_for: Duration,
        from: IpAddr,
        endpoint: &EndpointId,
        user: &str,
        password: &[u8],
    ) -> Result<Admitted, Stop> {
        self.check_limit(from, endpoint)?;
        let mut candidate = self.candidate(endpoint, user, fresh_for).await?;
        let mut good = self.accepts(&candidate, password).await?;
        if !good && !candidate.fresh {
            self.roles.doubt(endpoint, user);
            candidate = self.candidate(endpoint, user, fresh_for).await?;
            good = self.accepts(&candidate, password).await?;
        }
        if !good {
            self.limit.failed(self.begun.elapsed(), from, endpoint);
            return Err(wrong_password(user));
        }
        self.admit(from, candidate, user).await
    }

    /// Checks a JSON Web Token; gives what the control plane says of the role, and what the token says of its holder.
    /// `fresh_for`: how long what is known of the role is used without asking again.
    pub async fn by_token(
        &self,
        fresh_for: Duration,
        from: IpAddr,
        endpoint: &EndpointId,
        user: &str,
        token: &str,
    ) -> Result<(Arc<RoleAuth>, Claims), Stop> {
        self.check_limit(from, endpoint)?;
        let Ok(token) = Token::parse(token) else { return Err(self.refuse_token(from, endpoint, user)) };
        let mut candidate = self.candidate(endpoint, user, fresh_for).await?;
        let mut outcome = self.verify(&candidate, &token).await;
        if outcome.is_err() && !candidate.fresh {
            // Its issuer may have been added in this moment.
            self.roles.doubt(endpoint, user);
            candidate = self.candidate(endpoint, user, fresh_for).await?;
            outcome = self.verify(&candidate, &token).await;
        }
        match outcome {
            Ok(claims) => Ok((self.admit(from, candidate, user).await?.auth, claims)),
            // Nobody guesses a signature, and who comes with many tokens comes with some that are old.
            Err(VerifyError::Refused(TokenError::Expired)) => Err(expired_token(user)),
            Err(VerifyError::Unavailable) => {
                let message = "the token cannot be checked now, its issuer's keys cannot be fetched";
                Err(Stop::refuse(EndReason::IssuerDown, FatalError::new("57P03", message)))
            }
            Err(VerifyError::Refused(_)) => Err(self.refuse_token(from, endpoint, user)),
        }
    }

    async fn verify(&self, candidate: &Candidate, token: &Token<'_>) -> Result<Claims, VerifyError> {
        let issuers = candidate.auth.as_ref().map(|auth| auth.token_issuers.as_slice());
        self.key_sets.verify(issuers.unwrap_or_default(), token).await
    }

    fn refuse_token(&self, from: IpAddr, endpoint: &EndpointId, user: &str) -> Stop {
        self.limit.failed(self.begun.elapsed(), from, endpoint);
        wrong_password(user)
    }

    /// What follows a good login. Only now may a client learn that the endpoint is disabled, or not open to its address: who
    /// has no password is not to learn which endpoints exist.
    async fn admit(&self, from: IpAddr, candidate: Candidate, user: &str) -> Result<Admitted, Stop> {
        let Candidate { endpoint, auth, fresh, mut asked, .. } = candidate;
        // Nothing fits a made-up verifier.
        let mut auth = auth.ok_or_else(|| wrong_password(user))?;
        if !allows(&auth, from) && !fresh {
            // Its address may have been added in this moment.
            self.roles.doubt(&endpoint, user);
            let newest = self.role(&endpoint, user, Duration::ZERO).await?;
            asked = newest.asked;
            auth = newest.auth.ok_or_else(|| wrong_password(user))?;
        }
        if !allows(&auth, from) {
            return Err(address_not_allowed(&endpoint, from));
        }
        check_enabled(&endpoint, &auth)?;
        Ok(Admitted { auth, asked })
    }

    /// Errors when an address has failed too often to be heard now.
    pub fn check_limit(&self, from: IpAddr, endpoint: &EndpointId) -> Result<(), Stop> {
        if self.limit.admits(self.begun.elapsed(), from, endpoint) {
            return Ok(());
        }
        let error = FatalError {
            hint: Some("Wait a minute, and check the role, the password and the endpoint's id.".to_owned()),
            ..FatalError::new("28000", "too many failed logins from this address")
        };
        Err(Stop::refuse(EndReason::TooManyFailures, error))
    }

    async fn accepts(&self, candidate: &Candidate, password: &[u8]) -> Result<bool, Stop> {
        let stored = candidate.auth.as_ref().and_then(|auth| auth.scram_verifier.as_deref());
        let pair = stored.map(|stored| self.remembered.pair(stored, password));
        let is_remembered = || pair.is_some_and(|pair| self.remembered.contains(pair));
        if is_remembered() {
            return Ok(true);
        }
        let failed = |_| Stop::refuse(EndReason::Internal, FatalError::new("XX000", "the password check failed"));
        let _turn = self.hashing.acquire().await.map_err(failed)?;
        // Of many who come at once with the same password one does the work.
        if is_remembered() {
            return Ok(true);
        }
        let (verifier, password) = (candidate.verifier.clone(), password.to_vec());
        let checked = tokio::task::spawn_blocking(move || verifier.accepts_password(&password)).await;
        let good = checked
            .map_err(|_| Stop::refuse(EndReason::Internal, FatalError::new("XX000", "the password check failed")))?;
        if let Some(pair) = pair.filter(|_| good) {
            self.remembered.insert(pair);
        }
        Ok(good)
    }

    async fn role(&self, endpoint: &EndpointId, user: &str, fresh_for: Duration) -> Result<LookedUp, Stop> {
        let Found { role, fresh, asked } = self.roles.find(endpoint, user, fresh_for).await.map_err(|error| {
            tracing::warn!(%endpoint, %error, "cannot look a role up");
            let message = "the login cannot be checked now, the control plane gives no answer";
            Stop::refuse(EndReason::ControlPlaneDown, FatalError::new("57P03", message))
        })?;
        let auth = match role {
            Role::Known(auth) => Some(auth),
            // Nobody without a password is to learn which endpoints exist.
            Role::Missing | Role::EndpointMissing => None,
        };
        Ok(LookedUp { auth, fresh, asked })
    }

    async fn candidate(&self, endpoint: &EndpointId, user: &str, fresh_for: Duration) -> Result<Candidate, Stop> {
        let LookedUp { auth, fresh, asked } = self.role(endpoint, user, fresh_for).await?;
        let verifier = auth.as_deref().and_then(|auth| stored_verifier(endpoint, auth));
        let context = || [endpoint.as_str().as_bytes(), b"/", user.as_bytes()];
        Ok(Candidate {
            endpoint: endpoint.clone(),
            auth: auth.filter(|_| verifier.is_some()),
            verifier: verifier.unwrap_or_else(|| Verifier::mock(&self.mock_secret, &context())),
            fresh,
            asked,
        })
    }
}

/// The endpoint takes logins.
fn check_enabled(endpoint: &EndpointId, auth: &RoleAuth) -> Result<(), Stop> {
    if auth.enabled {
        return Ok(());
    }
    let error = FatalError {
        hint: Some("Enable it in the control plane, then connect again.".to_owned()),
        ..FatalError::new("55000", format!("endpoint \"{endpoint}\" is disabled"))
    };
    Err(Stop::refuse(EndReason::EndpointDisabled, error))
}

/// It does from there. An IPv4 address may come in the form of an IPv6 one.
fn allows(auth: &RoleAuth, from: IpAddr) -> bool {
    let from = from.to_canonical();
    auth.allowed_ips.is_empty() || auth.allowed_ips.iter().any(|network| network.contains(&from))
}

fn address_not_allowed(endpoint: &EndpointId, from: IpAddr) -> Stop {
    let from = from.to_canonical();
    let error = FatalError {
        hint: Some("Its owner can add the address to the project's allowed_ips.".to_owned()),
        ..FatalError::new("28000", format!("address {from} is not allowed to connect to endpoint \"{endpoint}\""))
    };
    Stop::refuse(EndReason::AddressNotAllowed, error)
}

/// `None` for a role that may not log in; a verifier that can't be read is that too, and a fault to be seen in the log.
fn stored_verifier(endpoint: &EndpointId, auth: &RoleAuth) -> Option<Verifier> {
    let parsed = Verifier::parse(auth.scram_verifier.as_deref()?);
    parsed.inspect_err(|error| tracing::error!(%endpoint, %error, "a role cannot log in")).ok()
}

/// The SCRAM exchange, up to `AuthenticationSASLFinal`.
async fn exchange(
    stream: &mut ClientStream,
    end_point: Option<&Arc<[u8]>>,
    verifier: &Verifier,
) -> Result<(), LoginError> {
    let offered: &[&str] = match end_point {
        Some(_) => &[SCRAM_SHA_256_PLUS, SCRAM_SHA_256],
        None => &[SCRAM_SHA_256],
    };
    send(stream, &messages::sasl_mechanisms(offered)).await?;
    let body = read_answer(stream, SASL_MAX_BYTES).await?;
    let (mechanism, client_first) = handshake::parse_sasl_initial(&body).map_err(Stop::from)?;
    let binding = match (mechanism, end_point) {
        (SCRAM_SHA_256_PLUS, Some(hash)) => Binding::Used(hash),
        (SCRAM_SHA_256, Some(_)) => Binding::Declined,
        (SCRAM_SHA_256, None) => Binding::NotOffered,
        _ => return Err(ScramError::Malformed("a mechanism that was not offered").into()),
    };
    let nonce = BASE64.encode(rand::random::<[u8; NONCE_BYTES]>());
    let exchange = Exchange::begin(verifier, binding, client_first, &nonce)?;
    send(stream, &messages::sasl_continue(exchange.server_first())).await?;
    let client_final = read_answer(stream, SASL_MAX_BYTES).await?;
    let server_final = exchange.finish(&client_final)?;
    send(stream, &messages::sasl_final(&server_final)).await?;
    Ok(())
}

enum LoginError {
    Scram(ScramError),
    Stop(Stop),
}

impl From<ScramError> for LoginError {
    fn from(error: ScramError) -> Self {
        Self::Scram(error)
    }
}

impl From<Stop> for LoginError {
    fn from(stop: Stop) -> Self {
        Self::Stop(stop)
    }
}

async fn send(stream: &mut ClientStream, message: &[u8]) -> Result<(), Stop> {
    stream.write_all(message).await?;
    Ok(stream.flush().await?)
}

/// The body of a message of type `p`: a password or a step of SASL.
async fn read_answer(stream: &mut ClientStream, limit: usize) -> Result<Bytes, Stop> {
    let mut header = [0; 5];
    stream.read_exact(&mut header).await?;
    let [kind, a, b, c, d] = header;
    if kind != b'p' {
        return Err(HandshakeError::UnexpectedMessage(kind).into());
    }
    let length = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap_or(usize::MAX);
    let bytes = length.checked_sub(4).filter(|bytes| *bytes <= limit).ok_or(HandshakeError::Length)?;
    let mut body = vec![0; bytes];
    stream.read_exact(&mut body).await?;
    Ok(body.into())
}

fn wrong_password(user: &str) -> Stop {
    let error = FatalError {
        hint: Some(
            "Check the role, the password, and the endpoint's id in the host name or in the options.".to_owned(),
        ),
        ..FatalError::new("28P01", format!("password authentication failed for user \"{user}\""))
    };
    Stop::refuse(EndReason::WrongPassword, error)
}

/// For a token that its issuer has signed: whoever has it knows that the role exists.
fn expired_token(user: &str) -> Stop {
    let error = FatalError {
        hint: Some("Get a new token from its issuer.".to_owned()),
        ..FatalError::new("28P01", format!("the token for user \"{user}\" has expired"))
    };
    Stop::refuse(EndReason::WrongPassword, error)
}

fn scram_refusal(error: ScramError) -> Stop {
    let (reason, sqlstate) = match error {
        ScramError::Malformed(_) | ScramError::BindingType => (EndReason::ProtocolViolation, "08P01"),
        ScramError::ChannelBindingMismatch | ScramError::Downgrade => (EndReason::ChannelBinding, "28000"),
        ScramError::WrongPassword => (EndReason::WrongPassword, "28P01"),
    };
    Stop::refuse(reason, FatalError::new(sqlstate, error.to_string()))
}

/// The error for an endpoint that does not exist.
pub fn endpoint_not_found(endpoint: &EndpointId) -> Stop {
    let error = FatalError {
        hint: Some("Check the endpoint's id in the host name or in the connection options.".to_owned()),
        ..FatalError::new("08004", format!("endpoint \"{endpoint}\" not found"))
    };
    Stop::refuse(EndReason::UnknownEndpoint, error)
}
