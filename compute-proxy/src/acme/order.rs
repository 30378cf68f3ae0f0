//! One certificate, through the steps of RFC 8555: account, order, proof, request, certificate.

use std::time::Duration;

use instant_acme::{
    Account, AccountCredentials, AuthorizationStatus, ChallengeType, Error, ExternalAccountKey, Identifier, NewAccount,
    NewOrder, Order, OrderStatus, RetryPolicy,
};
use rcgen::{CertificateParams, DistinguishedName, KeyPair};
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::{
    AcmeError,
    challenges::{Challenges, run_hook},
    config::{Proof, Wanted, challenge_record},
    http::AcmeHttp,
};
use crate::tls::{
    TlsError,
    files::{file_error, replace},
};

/// How long all of it may take, programs that make records included.
const ORDER_TIMEOUT: Duration = Duration::from_secs(1800);

/// How the server is asked whether it is done.
const POLLS: RetryPolicy =
    RetryPolicy::new().initial_delay(Duration::from_millis(250)).backoff(1.5).timeout(Duration::from_secs(180));

/// The server does not know the account: it was removed there, or the server has lost it.
const ACCOUNT_UNKNOWN: &str = "urn:ietf:params:acme:error:accountDoesNotExist";

/// Gets a certificate and writes it to its file.
pub async fn obtain(
    wanted: &Wanted,
    http: &AcmeHttp,
    challenges: &Challenges,
    shutdown: &CancellationToken,
) -> Result<(), AcmeError> {
    let account = account(wanted, http).await?;
    let identifiers: Vec<_> = wanted.names.iter().cloned().map(Identifier::Dns).collect();
    let mut order = match account.new_order(&NewOrder::new(&identifiers)).await {
        Err(Error::Api(problem)) if problem.r#type.as_deref() == Some(ACCOUNT_UNKNOWN) => {
            tracing::warn!(account = account.id(), "the ACME server does not know the account: making another");
            let account = new_account(wanted, http).await?;
            account.new_order(&NewOrder::new(&identifiers)).await?
        }
        other => other?,
    };
    let mut given = Vec::new();
    let proved = tokio::select! {
        () = shutdown.cancelled() => Err(AcmeError::Stopped),
        proved = timeout(ORDER_TIMEOUT, prove(wanted, challenges, &mut order, &mut given)) => {
            proved.unwrap_or(Err(AcmeError::TooLong(ORDER_TIMEOUT)))
        }
    };
    take_back(wanted, challenges, given).await;
    proved?;
    let key = KeyPair::generate().map_err(TlsError::from)?;
    let mut request = CertificateParams::new(wanted.names.clone()).map_err(TlsError::from)?;
    request.distinguished_name = DistinguishedName::new();
    let request = request.serialize_request(&key).map_err(TlsError::from)?;
    order.finalize_csr(request.der()).await?;
    let chain = order.poll_certificate(&POLLS).await?;
    check(&chain, &key)?;
    replace(&wanted.file, (key.serialize_pem() + &chain).as_bytes(), 0o600)?;
    Ok(())
}

/// The account that was made earlier, or a new one.
async fn account(wanted: &Wanted, http: &AcmeHttp) -> Result<Account, AcmeError> {
    let path = &wanted.account_file;
    if !path.exists() {
        return new_account(wanted, http).await;
    }
    let text = std::fs::read(path).map_err(file_error(path))?;
    let credentials: AccountCredentials =
        serde_json::from_slice(&text).map_err(|source| AcmeError::Account { path: path.clone(), source })?;
    Ok(Account::builder_with_http(Box::new(http.clone())).from_credentials(credentials).await?)
}

async fn new_account(wanted: &Wanted, http: &AcmeHttp) -> Result<Account, AcmeError> {
    let contact: Vec<&str> = wanted.contact.iter().map(String::as_str).collect();
    let new = NewAccount { contact: &contact, terms_of_service_agreed: true, only_return_existing: false };
    let external = wanted.external_account.as_ref().map(|(id, key)| ExternalAccountKey::new(id.clone(), key));
    let builder = Account::builder_with_http(Box::new(http.clone()));
    let (account, credentials) = builder.create(&new, wanted.directory.to_string(), external.as_ref()).await?;
    let text = serde_json::to_vec(&credentials).map_err(Error::from)?;
    replace(&wanted.account_file, &text, 0o600)?;
    tracing::info!(account = account.id(), file = %wanted.account_file.display(), "made an account with the ACME server");
    Ok(account)
}

/// Something that the server may look for.
struct Given {
    name: String,
    /// What the DNS is to say.
    value: String,
}

/// Proves all names. What must be taken back afterwards, in whatever way this ends, is added to `given`.
async fn prove(
    wanted: &Wanted,
    challenges: &Challenges,
    order: &mut Order,
    given: &mut Vec<Given>,
) -> Result<(), AcmeError> {
    let kind = match &wanted.proof {
        Proof::Handshake => ChallengeType::TlsAlpn01,
        Proof::Dns(_) => ChallengeType::Dns01,
    };
    // First all proofs, then the word that they are there: a domain and its wildcard share a record.
    let mut authorizations = order.authorizations();
    while let Some(authorization) = authorizations.next().await {
        let mut authorization = authorization?;
        if authorization.status != AuthorizationStatus::Pending {
            continue;
        }
        let name = authorization.identifier().to_string();
        let offered: Vec<_> = authorization.challenges.iter().map(|offer| format!("{:?}", offer.r#type)).collect();
        let challenge = authorization.challenge(kind.clone()).ok_or_else(|| AcmeError::NoChallenge {
            name: name.clone(),
            proof: wanted.proof.to_string(),
            offered: offered.join(", "),
        })?;
        let proof = challenge.key_authorization();
        given.push(Given { name: name.clone(), value: proof.dns_value() });
        match &wanted.proof {
            Proof::Handshake => challenges.present(&name, proof.digest().as_ref())?,
            Proof::Dns(program) => {
                run_hook(program, "present", &challenge_record(&name), &proof.dns_value()).await?;
            }
        }
    }
    let mut authorizations = order.authorizations();
    while let Some(authorization) = authorizations.next().await {
        let mut authorization = authorization?;
        if authorization.status == AuthorizationStatus::Pending
            && let Some(mut challenge) = authorization.challenge(kind.clone())
        {
            challenge.set_ready().await?;
        }
    }
    match order.poll_ready(&POLLS).await {
        Ok(OrderStatus::Ready) => Ok(()),
        Ok(_) => Err(not_proved(order).await?.unwrap_or(Error::Str("why the order is invalid").into())),
        Err(Error::Api(problem)) => Err(not_proved(order).await?.unwrap_or(Error::Api(problem).into())),
        Err(error) => Err(error.into()),
    }
}

/// What the server was not content with: the first name of which it says so.
async fn not_proved(order: &mut Order) -> Result<Option<AcmeError>, Error> {
    let mut authorizations = order.authorizations();
    while let Some(authorization) = authorizations.next().await {
        let authorization = authorization?;
        let name = authorization.identifier().to_string();
        if let Some(problem) = authorization.challenges.iter().find_map(|challenge| challenge.error.as_ref()) {
            return Ok(Some(AcmeError::NotProved { name, why: problem.to_string() }));
        }
    }
    Ok(None)
}

/// Takes away what the server has looked at. A failure is only noted: it does no harm to leave it.
async fn take_back(wanted: &Wanted, challenges: &Challenges, given: Vec<Given>) {
    for Given { name, value } in given {
        match &wanted.proof {
            Proof::Handshake => challenges.forget(&name),
            Proof::Dns(program) => {
                if let Err(error) = run_hook(program, "cleanup", &challenge_record(&name), &value).await {
                    tracing::warn!(%error, "a record of a proof may be left in the DNS");
                }
            }
        }
    }
}

/// A chain that would not work must not take the place of one that does.
fn check(chain: &str, key: &KeyPair) -> Result<(), AcmeError> {
    let certificates = CertificateDer::pem_slice_iter(chain.as_bytes()).collect::<Result<Vec<_>, _>>();
    let certificates = certificates.map_err(|error| AcmeError::Certificate(error.to_string()))?;
    let first = certificates.first().ok_or_else(|| AcmeError::Certificate("there is none in the answer".into()))?;
    super::validity(first)?;
    let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(TlsError::Key)?;
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    CertifiedKey::from_der(certificates, key, &provider).map_err(TlsError::from)?;
    Ok(())
}
