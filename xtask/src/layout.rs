//! Where the stack keeps things, and as whom Postgres runs.
//!
//! ```text
//! .stack/                 (or --dir)
//!   downloads/            of the repository's own .stack only: shared by all stacks, kept by --fresh
//!   data/postgres-18/     data/kafka-1/1/ …: one folder per version and per number of brokers
//!   conf/                 written at every start
//!   logs/                 one file per process
//!   lock  state.json  endpoints.json
//! ```

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt, MetadataExt, symlink},
    path::{Path, PathBuf},
};

use rustix::process::geteuid;

use crate::failure::{Explain, Failure, Result};

/// The user that Postgres runs as, when we are root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct User {
    pub uid: u32,
    pub gid: u32,
}

/// The folders of one stack; all of them exist.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    /// The repository.
    pub root: PathBuf,
    /// The stack's own folder, free of symbolic links.
    pub dir: PathBuf,
    pub downloads: PathBuf,
    /// Sockets, in a path short enough for one (108 bytes).
    pub run: PathBuf,
    /// `None`: we are not root, and Postgres runs as we do.
    pub user: Option<User>,
}

impl Layout {
    /// Makes the folders of the stack in `dir`, by default the repository's own.
    pub(crate) fn open(dir: Option<&Path>) -> Result<Self> {
        let root = repository()?;
        let user = if geteuid().is_root() { Some(unprivileged()?) } else { None };
        let home = settle(&root.join(".stack"), user)?;
        let dir = match dir {
            Some(dir) => settle(dir, user)?,
            None => home.clone(),
        };
        let layout = Self { downloads: home.join("downloads"), run: run_dir(&dir)?, root, dir, user };
        for folder in [&layout.downloads, &layout.logs(), &layout.conf(), &layout.data()] {
            fs::create_dir_all(folder).explain(|| format!("create {}", folder.display()))?;
        }
        Ok(layout)
    }

    pub(crate) fn logs(&self) -> PathBuf {
        self.dir.join("logs")
    }

    pub(crate) fn log(&self, name: &str) -> PathBuf {
        self.logs().join(format!("{name}.log"))
    }

    pub(crate) fn conf(&self) -> PathBuf {
        self.dir.join("conf")
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.dir.join("state.json")
    }

    pub(crate) fn endpoints(&self) -> PathBuf {
        self.dir.join("endpoints.json")
    }

    /// Where the supervisor takes commands.
    pub(crate) fn control(&self) -> PathBuf {
        self.run.join("control.sock")
    }

    /// In the environment of every process of this stack, so that `down` finds even those whose id was not
    /// written down before the supervisor was killed.
    pub(crate) fn mark(&self) -> (&'static str, String) {
        ("ORDER_STACK_DIR", self.dir.display().to_string())
    }
}

/// `cargo run` tells where the package is; a binary started by hand remembers where it was built.
fn repository() -> Result<PathBuf> {
    let package = std::env::var_os("CARGO_MANIFEST_DIR")
        .map(PathBuf::from)
        .filter(|dir| dir.ends_with("xtask"))
        .unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")));
    let root = package.parent().unwrap_or(&package);
    if !root.join("pom.xml").is_file() {
        return Err(Failure::new(format!("{} is not the repository any more", root.display()))
            .hint("run it as `cargo xtask`, in the repository"));
    }
    root.canonicalize().explain(|| format!("find {}", root.display()))
}

fn unprivileged() -> Result<User> {
    let passwd = fs::read_to_string("/etc/passwd").explain(|| "read /etc/passwd".to_owned())?;
    ["postgres", "nobody"].iter().find_map(|name| user(&passwd, name)).ok_or_else(|| {
        Failure::new("Postgres refuses to run as root, and there is no user `postgres` or `nobody`")
            .hint("create one (`useradd --system postgres`), or run this as an ordinary user")
    })
}

fn user(passwd: &str, name: &str) -> Option<User> {
    let fields: Vec<&str> = passwd
        .lines()
        .map(|line| line.split(':').collect())
        .find(|f: &Vec<&str>| f.first() == Some(&name) && f.len() >= 4)?;
    let (uid, gid) = (fields[2].parse().ok()?, fields[3].parse().ok()?);
    (uid != 0).then_some(User { uid, gid })
}

/// Makes `path` a folder that `user` can reach, and returns it free of symbolic links. A checkout under a home
/// that only its owner may enter (root's) gets a link to a folder under /var/tmp instead.
fn settle(path: &Path, user: Option<User>) -> Result<PathBuf> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(parent).explain(|| format!("create {}", parent.display()))?;
    let parent = parent.canonicalize().explain(|| format!("find {}", parent.display()))?;
    let path = parent.join(path.file_name().unwrap_or_default());
    let absent = fs::symlink_metadata(&path).is_err();
    if absent {
        if user.and_then(|user| barrier(&parent, user)).is_none() {
            fs::create_dir(&path).explain(|| format!("create {}", path.display()))?;
        } else {
            let away = substitute(&path)?;
            symlink(&away, &path).explain(|| format!("link {} to {}", path.display(), away.display()))?;
        }
    } else if fs::metadata(&path).is_err() {
        // A link of ours whose target was cleaned away.
        let target = fs::read_link(&path).explain(|| format!("read the link {}", path.display()))?;
        own_folder(&target, 0o755)?;
    }
    let real = path.canonicalize().explain(|| format!("find {}", path.display()))?;
    match user.and_then(|user| barrier(&real, user)) {
        None => Ok(real),
        Some(wall) => Err(Failure::new(format!(
            "Postgres runs as an unprivileged user, who may not enter {} on the way to {}",
            wall.display(),
            real.display()
        ))
        .hint(format!(
            "remove {} (a folder under /var/tmp is used then), give --dir another folder, or run as an ordinary user",
            path.display()
        ))),
    }
}

/// The first folder on the way to `path` that `user` may not pass.
fn barrier(path: &Path, user: User) -> Option<PathBuf> {
    let mut way: Vec<&Path> = path.ancestors().collect();
    way.reverse();
    let closed = |folder: &&Path| fs::metadata(folder).is_ok_and(|meta| !may_enter(&meta, user));
    way.into_iter().find(closed).map(Path::to_path_buf)
}

fn may_enter(meta: &fs::Metadata, user: User) -> bool {
    let bit = if meta.uid() == user.uid {
        0o100
    } else if meta.gid() == user.gid {
        0o010
    } else {
        0o001
    };
    meta.mode() & bit != 0
}

fn substitute(path: &Path) -> Result<PathBuf> {
    let name = format!("order-stack-{:016x}", fnv1a(path.as_os_str().as_encoded_bytes()));
    let base =
        ["/var/tmp", "/tmp"].iter().map(Path::new).find(|base| base.is_dir()).unwrap_or(Path::new("/tmp"));
    let away = base.join(name);
    own_folder(&away, 0o755)?;
    Ok(away)
}

/// One per stack and user. Short whatever the length of the path to the stack, and the same at every start.
fn run_dir(dir: &Path) -> Result<PathBuf> {
    let uid = geteuid().as_raw();
    let run =
        PathBuf::from(format!("/tmp/order-stack-{uid}-{:016x}", fnv1a(dir.as_os_str().as_encoded_bytes())));
    own_folder(&run, 0o755)?;
    Ok(run)
}

/// Makes a folder in a place where everybody may write, and refuses one that somebody else put there.
fn own_folder(path: &Path, mode: u32) -> Result<()> {
    match fs::DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(Failure::new(format!("cannot create {}: {error}", path.display())));
        }
        _ => {}
    }
    let meta = fs::symlink_metadata(path).explain(|| format!("look at {}", path.display()))?;
    if !meta.is_dir() || meta.uid() != geteuid().as_raw() {
        return Err(Failure::new(format!("{} is not a folder of this user's", path.display()))
            .hint("remove it, and see who made it"));
    }
    Ok(())
}

/// A hash that is the same in every version of this tool (std's is not).
pub(crate) fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_found_in_passwd_and_root_never_is() {
        let passwd = "root:x:0:0::/root:/bin/sh\nbroken\npostgres:x:101:104:a:/b:/c\ntoor:x:0:0::/:/bin/sh\n";
        assert_eq!(user(passwd, "postgres"), Some(User { uid: 101, gid: 104 }));
        assert_eq!(user(passwd, "nobody"), None);
        assert_eq!(user(passwd, "toor"), None);
    }

    #[test]
    fn a_private_folder_is_a_barrier_for_others_only() {
        let base = std::env::temp_dir().join(format!("xtask-barrier-{}", std::process::id()));
        let deep = base.join("private/deep");
        fs::create_dir_all(&deep).unwrap();
        let private = base.join("private");
        fs::set_permissions(&private, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        let owner = User { uid: fs::metadata(&private).unwrap().uid(), gid: 1 };
        let stranger = User { uid: 54_321, gid: 54_321 };
        assert_eq!(barrier(&deep, owner), None);
        assert_eq!(barrier(&deep, stranger), Some(private));
        fs::remove_dir_all(&base).unwrap();
    }

    #[test]
    fn the_hash_is_fnv1a() {
        assert_eq!(fnv1a(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a(b"a"), 0xaf63_dc4c_8601_ec8c);
    }
}
