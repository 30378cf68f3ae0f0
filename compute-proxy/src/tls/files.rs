//! Files of certificates and keys: read, and written so that nobody ever sees half of one.

use std::{
    fs, io,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use rustls_pki_types::{CertificateDer, pem::PemObject};

use super::TlsError;

/// An error with this file's name.
pub fn file_error(path: &Path) -> impl FnOnce(io::Error) -> TlsError + use<> {
    let path = path.to_owned();
    move |source| TlsError::File { path, source }
}

/// The same for what is in the file.
pub fn pem_error(path: &Path) -> impl FnOnce(rustls_pki_types::pem::Error) -> TlsError + use<> {
    let path = path.to_owned();
    move |source| TlsError::Pem { path, source }
}

/// The certificates of a PEM file, at least one.
pub fn read_chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certificates = CertificateDer::pem_file_iter(path).map_err(pem_error(path))?;
    let chain: Vec<_> = certificates.collect::<Result<_, _>>().map_err(pem_error(path))?;
    if chain.is_empty() { Err(TlsError::NoCertificate(path.to_owned())) } else { Ok(chain) }
}

/// Creates a file at once and whole; an existing one is left alone.
pub fn write_once(path: &Path, content: &[u8], mode: u32) -> Result<(), TlsError> {
    let temporary = write_beside(path, content, mode)?;
    let linked = match fs::hard_link(&temporary, path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    };
    let removed = fs::remove_file(&temporary);
    linked.and(removed).map_err(file_error(path))
}

/// Writes a file at once and whole, in place of what was there.
pub fn replace(path: &Path, content: &[u8], mode: u32) -> Result<(), TlsError> {
    let temporary = write_beside(path, content, mode)?;
    fs::rename(&temporary, path).map_err(file_error(path))
}

fn write_beside(path: &Path, content: &[u8], mode: u32) -> Result<PathBuf, TlsError> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{:016x}", rand::random::<u64>()));
    let temporary = PathBuf::from(name);
    let mut options = fs::OpenOptions::new();
    let file = options.write(true).create_new(true).mode(mode).open(&temporary);
    file.and_then(|mut file| file.write_all(content).and_then(|()| file.sync_all())).map_err(file_error(path))?;
    Ok(temporary)
}
