//! Certificates made here.

use std::path::{Path, PathBuf};

use chrono::Datelike as _;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair, date_time_ymd,
};

/// A certificate authority, and the folder where its certificates go.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    folder: PathBuf,
    name: String,
    /// Its own certificate.
    pub(crate) path: PathBuf,
}

/// The files of a certificate, in PEM.
pub(crate) struct Certificate {
    pub(crate) cert: PathBuf,
    pub(crate) key: PathBuf,
    /// Key and certificate in one, as Kafka wants them.
    pub(crate) both: PathBuf,
}

impl Authority {
    pub(crate) fn new(folder: &Path, name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let path = write(folder, &format!("{name}.pem"), &params.self_signed(&key).unwrap().pem());
        Self { issuer: Issuer::new(params, key), folder: folder.to_owned(), name: name.to_owned(), path }
    }

    /// A certificate for `name` that ends with `last_year`.
    pub(crate) fn certificate(&self, name: &str, last_year: i32) -> Certificate {
        self.certificate_until(name, &last_year.to_string(), (last_year, 12, 31))
    }

    /// One that ends in so many days.
    pub(crate) fn certificate_for_days(&self, name: &str, days: u64) -> Certificate {
        let last = chrono::Utc::now() + chrono::Days::new(days);
        let last = (last.year(), u8::try_from(last.month()).unwrap(), u8::try_from(last.day()).unwrap());
        self.certificate_until(name, &format!("{days}-days"), last)
    }

    fn certificate_until(&self, name: &str, label: &str, (year, month, day): (i32, u8, u8)) -> Certificate {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(year, month, day);
        let key = KeyPair::generate().unwrap();
        let (cert, key) = (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem());
        let file = |ending: &str, content: &str| {
            write(&self.folder, &format!("{}-{name}-{label}.{ending}", self.name), content)
        };
        Certificate {
            both: file("both.pem", &format!("{key}{cert}")),
            cert: file("pem", &cert),
            key: file("key", &key),
        }
    }
}

fn write(folder: &Path, name: &str, content: &str) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, content).unwrap();
    path
}
