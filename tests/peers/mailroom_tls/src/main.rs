//! payjoin-mailroom over TLS with a certificate of one's own, trusting a root of one's own behind it.
//!
//! The published program speaks TLS only with certificates it gets over ACME, and its relay trusts only the public roots. Its
//! library offers both to tests, by the feature `_manual-tls`; this program is that offer on a command line, and nothing else.
//!
//!     payjoin-mailroom-tls CONFIG CERTIFICATES.pem KEY.pem ROOT.der

use std::env::args_os;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use axum_server::tls_rustls::RustlsConfig;
use payjoin_mailroom::config::Config;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let given: Vec<PathBuf> = args_os().skip(1).map(PathBuf::from).collect();
    if given == [Path::new("--version")] {
        println!("payjoin-mailroom-tls {}", env!("CARGO_PKG_VERSION"));
        return Ok(());
    }
    let [config, certificates, key, root] = given.as_slice() else {
        bail!("usage: payjoin-mailroom-tls CONFIG CERTIFICATES.pem KEY.pem ROOT.der");
    };
    let filter = EnvFilter::builder().with_default_directive(LevelFilter::INFO.into()).from_env_lossy();
    tracing_subscriber::fmt().with_env_filter(filter).init();

    // Both providers may be compiled in: say which, or rustls refuses to choose.
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        bail!("a provider of cryptography was chosen before this program could");
    }
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(std::fs::read(root).with_context(|| root.display().to_string())?))?;
    let tls = RustlsConfig::from_pem_file(certificates, key).await.context("the certificate or its key")?;
    let (_, serving) =
        payjoin_mailroom::serve_manual_tls(Config::from_file(config)?, Some(tls), roots, None).await?;
    serving.await?
}
