#!/usr/bin/env bash
# Makes the databases and applies postgres/*.sql. Everything in it can be repeated. Where the server is and who
# we are comes from PGHOST, PGUSER and PGPASSWORD: the superuser.
set -euo pipefail

sql() {
    psql --no-psqlrc --quiet --set=ON_ERROR_STOP=1 "$@"
}

# CREATE DATABASE knows no IF NOT EXISTS and no transaction, so a query makes the statement, or none.
ensure() {
    local name=$1 options=$2
    sql --dbname=postgres <<SQL
SELECT 'CREATE DATABASE $name $options' WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = '$name') \gexec
SQL
}

scripts=${SCRIPTS:-/postgres}
ensure orders ''
sql --dbname=orders --file="$scripts/init.sql" --file="$scripts/local.sql"
# Its owner comes from local.sql.
ensure consumers 'OWNER consumer'
sql --dbname=consumers --file="$scripts/consumers.sql"
echo "the databases orders and consumers are there"
