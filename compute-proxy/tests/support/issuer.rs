//! An issuer of JSON Web Tokens: keys, and a server that publishes their public halves.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use axum::{Router, extract::State, http::StatusCode, response::IntoResponse, routing::get};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use control_plane_api::internal::TokenIssuer;
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode, get_current_timestamp, jwk::Jwk};
use parking_lot::Mutex;
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ED25519, PKCS_RSA_SHA256};
use serde_json::{Value, json};
use tokio::net::TcpListener;

/// A private key with an id.
pub struct Signer {
    pub id: String,
    algorithm: Algorithm,
    key: EncodingKey,
    public: Value,
}

impl Signer {
    pub fn new(id: &str, algorithm: Algorithm) -> Self {
        let kind = match algorithm {
            Algorithm::RS256 => &PKCS_RSA_SHA256,
            Algorithm::ES256 => &PKCS_ECDSA_P256_SHA256,
            _ => &PKCS_ED25519,
        };
        let pair = KeyPair::generate_for(kind).expect("a key");
        let key = match algorithm {
            Algorithm::RS256 => EncodingKey::from_rsa_pem(pair.serialize_pem().as_bytes()).expect("a key"),
            Algorithm::ES256 => EncodingKey::from_ec_pem(pair.serialize_pem().as_bytes()).expect("a key"),
            _ => EncodingKey::from_ed_der(pair.serialized_der()),
        };
        let mut public = match algorithm {
            Algorithm::EdDSA => json!({"kty": "OKP", "crv": "Ed25519", "x": BASE64.encode(pair.public_key_raw())}),
            _ => serde_json::to_value(Jwk::from_encoding_key(&key, algorithm).expect("a public key")).expect("JSON"),
        };
        public["kid"] = json!(id);
        Self { id: id.to_owned(), algorithm, key, public }
    }

    /// Its public half, as it is published.
    pub fn public(&self) -> Value {
        self.public.clone()
    }

    pub fn sign(&self, claims: &Value) -> String {
        self.sign_as(Some(&self.id), claims)
    }

    /// The same under another key's name, or none.
    pub fn sign_as(&self, id: Option<&str>, claims: &Value) -> String {
        let mut header = Header::new(self.algorithm);
        header.kid = id.map(str::to_owned);
        encode(&header, claims, &self.key).expect("a token")
    }

    /// A token for an hour.
    pub fn token(&self, subject: &str) -> String {
        self.sign(&json!({"sub": subject, "aud": "shop", "iss": "issuer", "exp": get_current_timestamp() + 3600}))
    }
}

/// Publishes keys.
pub struct Issuer {
    pub url: String,
    published: Arc<Published>,
}

#[derive(Default)]
struct Published {
    keys: Mutex<Option<Vec<Value>>>,
    fetches: AtomicUsize,
}

impl Issuer {
    pub async fn start(signers: &[&Signer]) -> Self {
        let published = Arc::new(Published::default());
        let router = Router::new()
            .route("/keys", get(keys))
            .route("/moved", get(|| async { (StatusCode::FOUND, [("location", "/keys")]) }))
            .with_state(published.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let url = format!("http://{}", listener.local_addr().expect("address"));
        tokio::spawn(async move { axum::serve(listener, router).await });
        let issuer = Self { url, published };
        issuer.publish(signers.iter().map(|signer| signer.public()).collect());
        issuer
    }

    pub fn publish(&self, keys: Vec<Value>) {
        *self.published.keys.lock() = Some(keys);
    }

    /// Answers with an error from now on.
    pub fn fail(&self) {
        *self.published.keys.lock() = None;
    }

    pub fn fetches(&self) -> usize {
        self.published.fetches.load(Ordering::SeqCst)
    }

    /// As the control plane tells it to proxies.
    pub fn wanted(&self) -> TokenIssuer {
        self.wanted_at("/keys")
    }

    pub fn wanted_at(&self, path: &str) -> TokenIssuer {
        let text = |text: &str| Some(text.to_owned());
        TokenIssuer { jwks_url: format!("{}{path}", self.url), audience: text("shop"), issuer: text("issuer") }
    }
}

async fn keys(State(published): State<Arc<Published>>) -> impl IntoResponse {
    published.fetches.fetch_add(1, Ordering::SeqCst);
    match published.keys.lock().clone() {
        Some(keys) => (StatusCode::OK, json!({ "keys": keys }).to_string()),
        None => (StatusCode::SERVICE_UNAVAILABLE, String::new()),
    }
}
