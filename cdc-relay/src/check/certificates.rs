//! How long the certificates last that the relay uses and is shown.

use std::{
    fmt::Display,
    fs::File,
    io::Read,
    net::{TcpStream, ToSocketAddrs as _},
    path::Path,
    time::Duration,
};

use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use x509_parser::parse_x509_certificate;

use super::Report;
use crate::{
    config::Settings,
    replication::{connection::Connection, tls},
};

/// What lasts no longer is told.
const SOON_DAYS: i64 = 30;
/// How long a broker may take for a handshake.
const TIMEOUT: Duration = Duration::from_secs(5);
/// The most of a certificate file that is read, in bytes: there are some hundred in a system's.
const FILE_LIMIT_BYTES: u64 = 4 << 20;

/// The files that the configuration names.
pub(super) fn examine_files(settings: &Settings, report: &mut Report) {
    let info = &settings.postgres;
    let kafka =
        |name: &str| settings.kafka.properties.get(name).map(|path| Path::new(path.expose()).to_owned());
    let files = [
        ("sslcert", info.ssl_cert.clone()),
        ("sslrootcert", info.ssl_root_cert.clone()),
        ("ssl.certificate.location", kafka("ssl.certificate.location")),
        ("ssl.ca.location", kafka("ssl.ca.location")),
    ];
    for (name, path) in files {
        let Some(path) = path.filter(|path| path.is_file()) else { continue };
        let mut pem = Vec::new();
        let read = File::open(&path).and_then(|file| file.take(FILE_LIMIT_BYTES).read_to_end(&mut pem));
        if let Err(e) = read {
            report.note(format!("cannot read {}: {e}", path.display()));
            continue;
        }
        let certificates: Vec<_> = CertificateDer::pem_slice_iter(&pem).filter_map(Result::ok).collect();
        // Of a list of authorities some are always old; a file with one or two is somebody's own.
        let shown = certificates.iter().filter_map(expiry).filter(|_| certificates.len() <= 5);
        if let Some(expiry) = shown.min_by_key(|expiry| expiry.days) {
            let mend = [format!("# put a new certificate into {}, then restart the relay", path.display())];
            tell(&format!("{name} {}", path.display()), &"", &expiry, &mend, report);
        }
    }
}

/// What Postgres shows us on this connection.
pub(super) fn examine_postgres(connection: &Connection, report: &mut Report) {
    if let Some(expiry) = connection.server_certificate().as_deref().and_then(expiry) {
        let mend = [
            "-- put a new certificate into the server's ssl_cert_file and ssl_key_file, then:".to_owned(),
            "SELECT pg_reload_conf();".to_owned(),
        ];
        tell("the server's certificate", connection.place(), &expiry, &mend, report);
    }
}

/// What the brokers show.
pub(super) fn examine_brokers(settings: &Settings, brokers: &[String], report: &mut Report) {
    let protocol = settings.kafka.properties.get("security.protocol");
    if !protocol.is_some_and(|protocol| protocol.expose().to_ascii_lowercase().ends_with("ssl")) {
        return;
    }
    for broker in brokers {
        match shown_by(broker) {
            Ok(der) => {
                if let Some(expiry) = expiry(&der) {
                    let mend =
                        ["# put a new certificate into the broker's keystore, and restart it".to_owned()];
                    tell("the broker's certificate", broker, &expiry, &mend, report);
                }
            }
            Err(why) => report.note(format!("the certificate of broker {broker} was not seen: {why}")),
        }
    }
}

fn shown_by(broker: &str) -> Result<Vec<u8>, String> {
    let (host, _) = broker.rsplit_once(':').ok_or("it has no port")?;
    let address = broker.to_socket_addrs().map_err(|e| e.to_string())?.next().ok_or("it has no address")?;
    let mut socket = TcpStream::connect_timeout(&address, TIMEOUT).map_err(|e| e.to_string())?;
    for set in [TcpStream::set_read_timeout, TcpStream::set_write_timeout] {
        set(&socket, Some(TIMEOUT)).map_err(|e| e.to_string())?;
    }
    let mut client = tls::onlooker(host).map_err(|e| e.message)?;
    // Where it wants a certificate of ours, it has shown its own before it ends the handshake.
    let handshake = client.complete_io(&mut socket).map(drop);
    tls::shown(&client).ok_or_else(|| match handshake {
        Ok(()) => "it has shown none".into(),
        Err(e) => e.to_string(),
    })
}

/// When a certificate ends.
struct Expiry {
    is_over: bool,
    /// From now.
    days: i64,
    at: String,
}

fn expiry(der: impl AsRef<[u8]>) -> Option<Expiry> {
    let (_, certificate) = parse_x509_certificate(der.as_ref()).ok()?;
    let ends = certificate.validity().not_after;
    let at = chrono::DateTime::from_timestamp(ends.timestamp(), 0)?;
    let left = at - chrono::Utc::now();
    let is_over = left <= chrono::TimeDelta::zero();
    Some(Expiry { is_over, days: left.num_days(), at: at.format("%Y-%m-%d").to_string() })
}

fn tell(what: &str, place: &impl Display, expiry: &Expiry, mend: &[String], report: &mut Report) {
    let Expiry { is_over, days, at } = expiry;
    if *days >= SOON_DAYS {
        return;
    }
    let found = if *is_over {
        format!("{what} is over since {at}")
    } else {
        format!("{what} ends on {at}, in {days} days")
    };
    let mend: Vec<&str> = mend.iter().map(String::as_str).collect();
    report.finding("certificate-ends", &place.to_string(), found, &mend);
}
