{{/* Names, labels and images. */}}

{{- define "proxmox-csi.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- define "proxmox-csi.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- if contains $name .Release.Name }}
{{- .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}
{{- end }}

{{- define "proxmox-csi.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/name: {{ include "proxmox-csi.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{/* What pods of a component are selected by: dict "root" $ "component" "node". */}}
{{- define "proxmox-csi.selector" -}}
app.kubernetes.io/name: {{ include "proxmox-csi.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* The service account of a component, in the same form. */}}
{{- define "proxmox-csi.account" -}}
{{- $name := default (include "proxmox-csi.fullname" .root) .root.Values.serviceAccount.name }}
{{- printf "%s-%s" $name .component }}
{{- end }}

{{/* An image of the driver's own: dict "root" $ "image" .Values.…image. */}}
{{- define "proxmox-csi.image" -}}
{{- $tag := coalesce .image.tag .root.Values.image.tag .root.Chart.AppVersion }}
{{- if hasPrefix "ghcr.io/sergelogvinov/" .image.repository }}
{{- fail (printf "%s is an image of the Go driver: take it out of the values, this chart runs its own" .image.repository) }}
{{- end }}
{{- with .root.Values.image.registry }}{{ trimSuffix "/" . }}/{{ end }}{{ .image.repository }}:{{ $tag }}
{{- end }}

{{/* The Secret with the configuration file. */}}
{{- define "proxmox-csi.configSecret" -}}
{{- default (include "proxmox-csi.fullname" .) .Values.existingConfigSecret }}
{{- end }}

{{/* Which halves there are: "yes" or nothing. */}}
{{- define "proxmox-csi.has.controllers" -}}
{{- if ne .Values.mode "tenant" }}yes{{ end }}
{{- end }}
{{- define "proxmox-csi.has.csiController" -}}
{{- if and (ne .Values.mode "tenant") .Values.controller.enabled }}yes{{ end }}
{{- end }}
{{- define "proxmox-csi.has.ccm" -}}
{{- if and (ne .Values.mode "tenant") .Values.ccm.enabled }}yes{{ end }}
{{- end }}
{{- define "proxmox-csi.has.node" -}}
{{- if and (ne .Values.mode "management") .Values.node.enabled }}yes{{ end }}
{{- end }}
{{/* Objects of the cluster whose volumes these are. */}}
{{- define "proxmox-csi.has.csiObjects" -}}
{{- if and (ne .Values.mode "management") (or .Values.node.enabled .Values.controller.enabled) }}yes{{ end }}
{{- end }}

{{/* Rights of a component in the cluster of the nodes: "yes" or nothing. */}}
{{- define "proxmox-csi.has.rights" -}}
{{- if and .root.Values.rbac.create (ne .root.Values.mode "management") }}
{{- if eq .component "node" }}{{ if .root.Values.node.enabled }}yes{{ end }}
{{- else if eq .component "controller" }}{{ if .root.Values.controller.enabled }}yes{{ end }}
{{- else }}{{ if .root.Values.ccm.enabled }}yes{{ end }}
{{- end }}
{{- end }}
{{- end }}
