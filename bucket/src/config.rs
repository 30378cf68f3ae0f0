//! Which object store: a local directory or a bucket.

use std::{path::PathBuf, sync::Arc, time::Duration};

use object_store::{
    BackoffConfig, ClientConfigKey, ObjectStore, RetryConfig,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
    local::LocalFileSystem,
    path::Path,
    prefix::PrefixStore,
};

/// Where all data is kept. `file:///path`, `/path`, or `s3://bucket/prefix` with the usual `AWS_*` variables
/// (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT_URL`, `AWS_ALLOW_HTTP`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ObjectStoreConfig {
    /// A directory on this machine, made when it is not there.
    Local(PathBuf),
    /// A bucket of an S3-compatible store.
    S3 {
        /// Its name.
        bucket: String,
        /// Put before every key; may be empty.
        prefix: String,
    },
}

/// The object store's name or settings are no good.
#[derive(Debug, thiserror::Error)]
pub enum ObjectStoreConfigError {
    /// Not one of the known forms.
    #[error("not an object store (expected /path, file:///path or s3://bucket/prefix): {0:?}")]
    Unknown(String),
    /// The directory can't be made.
    #[error("object store directory {path}: {source}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The client can't be made from the settings.
    #[error("object store settings: {0}")]
    Settings(#[from] object_store::Error),
}

impl ObjectStoreConfig {
    /// Reads the text forms listed above.
    pub fn parse(text: &str) -> Result<ObjectStoreConfig, ObjectStoreConfigError> {
        let unknown = || ObjectStoreConfigError::Unknown(text.to_owned());
        if text.starts_with('/') {
            return Ok(ObjectStoreConfig::Local(text.into()));
        }
        let url = url::Url::parse(text).map_err(|_| unknown())?;
        let extras = url.query().is_some() || url.fragment().is_some();
        match (url.scheme(), url.host_str()) {
            ("file", None) if !extras => Ok(ObjectStoreConfig::Local(url.to_file_path().map_err(|()| unknown())?)),
            ("s3", Some(bucket)) if !extras => {
                Ok(ObjectStoreConfig::S3 { bucket: bucket.to_owned(), prefix: url.path().trim_matches('/').to_owned() })
            }
            _other => Err(unknown()),
        }
    }

    /// The client. A request ends after 30 s at the latest, and is repeated at most five times while less than 45 s have gone: one that
    /// is never answered gets a second try.
    pub fn open(&self) -> Result<Arc<dyn ObjectStore>, ObjectStoreConfigError> {
        match self {
            ObjectStoreConfig::Local(path) => Ok(Arc::new(open_local(path)?)),
            ObjectStoreConfig::S3 { bucket, prefix } => open_s3(AmazonS3Builder::from_env(), bucket, prefix),
        }
    }
}

/// The client of a directory, which is made when it is not there.
pub fn open_local(path: &std::path::Path) -> Result<LocalFileSystem, ObjectStoreConfigError> {
    let failed = |source| ObjectStoreConfigError::Directory { path: path.to_owned(), source };
    std::fs::create_dir_all(path).map_err(failed)?;
    Ok(LocalFileSystem::new_with_prefix(path)?.with_fsync(true).with_automatic_cleanup(true))
}

/// The client of a bucket, with what `builder` says of endpoint and credentials.
pub fn open_s3(
    builder: AmazonS3Builder,
    bucket: &str,
    prefix: &str,
) -> Result<Arc<dyn ObjectStore>, ObjectStoreConfigError> {
    let second = Duration::from_secs(1);
    let backoff = BackoffConfig { init_backoff: Duration::from_millis(50), max_backoff: 2 * second, base: 2.0 };
    let retry = RetryConfig { backoff, max_retries: 5, retry_timeout: 45 * second };
    let store = builder
        .with_config(AmazonS3ConfigKey::Client(ClientConfigKey::Timeout), "30 seconds")
        .with_config(AmazonS3ConfigKey::Client(ClientConfigKey::ConnectTimeout), "5 seconds")
        .with_retry(retry)
        .with_bucket_name(bucket)
        .build()?;
    Ok(Arc::new(PrefixStore::new(store, Path::from(prefix))))
}

impl std::str::FromStr for ObjectStoreConfig {
    type Err = ObjectStoreConfigError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

impl std::fmt::Display for ObjectStoreConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ObjectStoreConfig::Local(path) => write!(f, "file://{}", path.display()),
            ObjectStoreConfig::S3 { bucket, prefix } => write!(f, "s3://{bucket}/{prefix}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_known_forms_are_read() {
        let local = ObjectStoreConfig::Local("/a/b".into());
        assert_eq!(ObjectStoreConfig::parse("/a/b").expect("path"), local);
        assert_eq!(ObjectStoreConfig::parse("file:///a/b").expect("url"), local);
        let s3 = ObjectStoreConfig::parse("s3://bucket/some/prefix/").expect("s3");
        assert_eq!(s3, ObjectStoreConfig::S3 { bucket: "bucket".to_owned(), prefix: "some/prefix".to_owned() });
        assert_eq!(ObjectStoreConfig::parse(&s3.to_string()).expect("again"), s3);
        for bad in ["", "relative/path", "http://x/y", "s3://", "s3://b/p?x=1", "file://host/path"] {
            assert!(ObjectStoreConfig::parse(bad).is_err(), "{bad:?}");
        }
    }
}
